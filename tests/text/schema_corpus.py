"""200 JSON schemas: functions as agents have them, and keywords, alone and together."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

# A function a line: its name, then parameters: "?" is optional, "[]" a list, "a|b" one of these.
_FUNCTIONS = """
get_weather city unit:celsius|fahrenheit? days:integer?
calculate_triangle_area base:number height:number unit:cm|m|inch?
send_email to[] subject body cc[]? priority:low|normal|high?
book_flight origin destination date:date return_date:date? seats:integer cabin:economy|first?
search_products query category? min_price:number? max_price:number? in_stock:boolean?
create_event title start:date-time end:date-time attendees[]? location?
convert_currency amount:number from_currency:EUR|USD|GBP|JPY to_currency:EUR|USD|GBP|JPY
get_stock_price symbol exchange:NYSE|NASDAQ|LSE?
translate text source_language? target_language
set_alarm time:time label? repeat:daily|weekly|never
math_factorial number:integer
solve_quadratic a:number b:number c:number root_type:real|all?
prime_numbers_in_range start:integer end:integer
find_restaurants location cuisine[]? rating:number? price:1|2|3|4?
play_song title artist? shuffle:boolean?
sql_query table columns[] where? limit:integer?
get_directions origin destination mode:driving|walking|cycling|transit
update_user user_id:uuid name? email:email? active:boolean?
delete_file path force:boolean
git_commit message files[] amend:boolean?
predict_house_price bedrooms:integer bathrooms:number area:integer location
calculate_compound_interest principal:number rate:number years:integer compounds_per_year:integer?
recipe_search ingredients[] diet:vegan|vegetarian|keto|none servings:integer?
lawsuit_search company start_date:date location? status:open|closed|settled?
sentiment text languages[]?
resize_image url:uri width:integer height:integer keep_ratio:boolean?
schedule_meeting participants[] duration_minutes:integer timezone?
bmi weight:number height:number system:metric|imperial?
get_movie title year:integer?
hotel_booking city check_in:date check_out:date guests:integer room:single|double|suite?
track_package carrier:ups|fedex|dhl number
random_number low:integer high:integer count:integer?
electric_field charge:number distance:number
genome_lookup gene species:human|mouse|fly
dns_lookup host record:A|AAAA|MX|TXT
ping address:ipv4 count:integer?
connect host:hostname port:integer tls:boolean
add_address street city zip country:DE|FR|US
poll question options[] anonymous:boolean
sort_list values[] order:asc|desc?
matrix_multiply rows:integer columns:integer values[]
chess_move piece:king|queen|rook|bishop|knight|pawn from_square to_square
color_mix first second ratio:number?
summarize document max_words:integer? style:bullet|paragraph
timer seconds:integer
read_sensor id:uuid unit?
wikipedia query sentences:integer? language:en|de|fr|ja?
log level:debug|info|warning|error message
pay account amount:number currency:EUR|USD reference?
tag_photo photo:uri tags[]
"""
_FORMATS = ("date", "time", "date-time", "uuid", "email", "uri", "ipv4", "hostname")


def _property(text: str) -> tuple[str, Schema, bool]:
    text, optional = text.removesuffix("?"), text.endswith("?")
    name, _, kind = text.partition(":")
    schema: Schema = {"type": kind or "string", "description": f"The {name.strip('[]')}."}
    if "|" in kind:
        schema["type"], schema["enum"] = "string", kind.split("|")
    elif kind in _FORMATS:
        schema["type"], schema["format"] = "string", kind
    elif name.endswith("[]"):
        schema = {"type": "array", "items": {"type": "string"}, "maxItems": 4}
    return name.removesuffix("[]"), schema, optional


def _function(line: str) -> Schema:
    name, *parameters = line.split()
    properties = [_property(text) for text in parameters]
    return {
        "title": name,
        "type": "object",
        "properties": {name: schema for name, schema, _ in properties},
        "required": [name for name, _, optional in properties if not optional],
    }


def _typed(kind: str, *many: Schema) -> list[Schema]:
    return [{"type": kind, **keywords} for keywords in many]


_STRING = _typed(
    "string",
    {}, {"minLength": 3}, {"maxLength": 5}, {"minLength": 2, "maxLength": 2}, {"maxLength": 0},
    {"pattern": "^[a-z]+$"}, {"pattern": "^\\d{3}-\\d{4}$"}, {"pattern": "[0-9a-f]"},
    {"pattern": "^(foo|bar)+"}, {"pattern": "^[A-Z]{2}\\d{2,5}$"}, {"pattern": "^[a-z]*\\.py$"},
    {"pattern": "^#[0-9a-fA-F]{6}$"}, {"pattern": "^\\s*$", "maxLength": 4},
    {"pattern": "^[^\"]+$"}, {"pattern": "^é+$"}, {"pattern": "^(a|b){0,3}c?$"},
    *({"format": name} for name in _FORMATS if name not in ("uri", "hostname", "email")),
    {"format": "email", "maxLength": 24}, {"format": "ipv6"},
    {"enum": ["a", "b", "ab"]}, {"enum": ["\"", "\\", "\n", "é", "\u2028", ""]},
    {"const": "x y"}, {"description": "Say \"hello\" {now}.", "maxLength": 8},
    {"contentMediaType": "text/html", "maxLength": 9}, {"default": "z", "examples": ["q"]},
)  # fmt: skip
_NUMBER = _typed(
    "integer",
    {}, {"minimum": 0}, {"maximum": -1}, {"minimum": 3, "maximum": 17}, {"exclusiveMinimum": 0},
    {"exclusiveMaximum": 10, "minimum": 8}, {"multipleOf": 5}, {"multipleOf": 7, "minimum": 100},
    {"enum": [1, 22, 333]}, {"const": -5}, {"minimum": -1000000, "maximum": 1000000},
    {"minimum": 2147483647},
) + _typed(
    "number",
    {}, {"minimum": 0.5}, {"maximum": 1.5, "minimum": -1.5}, {"exclusiveMinimum": 0, "maximum": 1},
    {"minimum": 0, "exclusiveMaximum": 360}, {"enum": [1.5, -2, 1e3]}, {"const": 0.25},
    {"minimum": 18, "maximum": 65},
)  # fmt: skip
_ARRAY = _typed(
    "array",
    {}, {"items": {"type": "integer"}}, {"maxItems": 0}, {"minItems": 2, "maxItems": 3},
    {"items": {"type": "string", "maxLength": 2}, "minItems": 1},
    {"prefixItems": [{"type": "string"}, {"type": "integer"}]},
    {"prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
    {"prefixItems": [{"const": 1}], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"items": {"type": "array", "items": {"type": "null"}}}, {"items": {"enum": [1, "1", None]}},
    {"items": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    {"items": True, "maxItems": 2}, {"items": {"anyOf": [{"type": "null"}, {"const": 3}]}},
    {"uniqueItems": False, "maxItems": 3},
)  # fmt: skip
_A, _B = {"a": {"type": "integer"}}, {"b": {"type": "boolean"}}
_OBJECT = _typed(
    "object",
    {}, {"properties": _A}, {"properties": _A | _B, "required": ["b"]},
    {"properties": _A, "required": ["a"], "additionalProperties": False},
    {"properties": _A, "additionalProperties": {"type": "null"}},
    {"properties": _A, "additionalProperties": True, "required": ["a"]},
    {"additionalProperties": {"type": "integer"}}, {"additionalProperties": False},
    {"patternProperties": {"^x_": {"type": "boolean"}}, "additionalProperties": False},
    {"patternProperties": {"^n": {"type": "number"}}, "properties": _B, "required": ["b"]},
    {"required": ["unknown"]}, {"minProperties": 1, "maxProperties": 1},
    {"minProperties": 2, "additionalProperties": {"type": "null"}},
    {"properties": {"properties": {"type": "string"}, "type": {"const": "type"}}},
    {"properties": {"a b": {"const": 1}, "\"": {"const": 2}, "é": {"const": 3}},
     "required": ["a b", "\"", "é"]},
    {"properties": {"o": {"type": "object", "properties": _A, "required": ["a"]}},
     "required": ["o"]},
    {"properties": {"x": False, "y": True}, "required": ["y"]},
    {"properties": {f"p{i}": {"type": "boolean"} for i in range(40)}},
    {"properties": {f"p{i}": {"const": i} for i in range(20)},
     "required": [f"p{i}" for i in range(0, 20, 3)]},
    {"properties": {"additionalProperties": {"type": "integer"}, "const": _A["a"]}},
)  # fmt: skip
_ANY: list[Schema] = [
    {}, {"title": "anything", "$comment": "at all"}, {"type": "null"}, {"type": "boolean"},
    {"type": ["string", "null"]}, {"type": ["integer", "boolean"], "minimum": 3},
    {"type": ["array", "object"]}, {"enum": [None, True, 1, "1", [1], {"a": 1}]},
    {"const": {"a": [1, {"properties": {}}], "b": None}}, {"const": [[], {}, ""]}, {"const": None},
    {"minimum": 5}, {"maxLength": 3}, {"pattern": "^q"}, {"required": ["k"]}, {"maxItems": 1},
    {"anyOf": [{"type": "integer", "minimum": 4}, {"type": "string", "maxLength": 2}]},
    {"anyOf": [{"properties": _A, "type": "object"}, {"type": "null"}]},
    {"anyOf": [{"const": 1}, {"const": 2}], "description": "one or two"},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"const": "a"}, {"const": "b"}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 9}]},
    {"allOf": [{"type": "object", "properties": _A, "required": ["a"]},
               {"properties": _B, "required": ["b"]}]},
    {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "z$"}, {"maxLength": 6}]},
    {"type": "object", "properties": _A, "anyOf": [{"required": ["a"]}, {"properties": _B}]},
    {"type": "string", "anyOf": [{"pattern": "^a"}, {"minLength": 4}]},
    {"nullable": True, "type": "integer"}, {"deprecated": True, "type": "boolean"},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "integer"},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array",
     "items": [{"type": "integer"}, {"type": "null"}], "additionalItems": False},
    {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"n": {"const": 4}},
     "type": "object", "properties": {"n": {"$ref": "#/definitions/n"}}, "required": ["n"]},
]  # fmt: skip
_LINK = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
_NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": _LINK},
         "required": ["v", "next"]}  # fmt: skip
_TREE = {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}
_POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
          "required": ["x", "y"], "additionalProperties": False}  # fmt: skip
_SHAPES = [
    {"type": "object", "properties": {"kind": {"const": kind}, **own}, "required": ["kind", *own]}
    for kind, own in (("circle", {"r": {"type": "number"}}), ("square", {"side": {"const": 1}}))
]


def _deep(depth: int) -> Schema:
    schema: Schema = {"type": "boolean"}
    for level in range(depth):
        name = f"level{level}"
        schema = {"type": "object", "properties": {name: schema}, "required": [name]}
    return schema


_REFS: list[Schema] = [
    {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"}, _TREE, _deep(3), _deep(12), _deep(40),
    {"$defs": {"p": _POINT}, "type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 3},
    {"$defs": {"p": _POINT}, "type": "object", "required": ["a", "b"],
     "properties": {"a": {"$ref": "#/$defs/p"}, "b": {"$ref": "#/$defs/p"}}},
    {"oneOf": _SHAPES, "discriminator": {"propertyName": "kind"}}, {"anyOf": _SHAPES},
    {"type": "array", "items": {"oneOf": _SHAPES}, "minItems": 1, "maxItems": 2},
    {"$defs": {"s": {"$ref": "#/$defs/t"}, "t": {"enum": ["t"]}}, "$ref": "#/$defs/s"},
    {"$defs": {"a/b~c": {"const": 1}}, "$ref": "#/$defs/a~1b~0c"},
    {"type": "object", "properties": {"x": {"const": 1}, "y": {"$ref": "#/properties/x"}},
     "required": ["y"]},
    {"$defs": {"even": {"type": "integer", "multipleOf": 2}},
     "allOf": [{"$ref": "#/$defs/even"}, {"minimum": 10, "maximum": 20}]},
    {"$id": "https://example.com/root", "$defs": {"n": {"type": "null"}}, "$ref": "#/$defs/n"},
]  # fmt: skip

FUNCTIONS = [_function(line) for line in _FUNCTIONS.strip().splitlines()]
# Several functions, one of which is called.
_CALLS = [
    {"anyOf": [
        {"type": "object", "required": ["name", "arguments"], "additionalProperties": False,
         "properties": {"name": {"const": f["title"]}, "arguments": f}}
        for f in FUNCTIONS[first : first + 5]
    ]}
    for first in range(0, 50, 5)
]  # fmt: skip
_CORPUS = [*FUNCTIONS, *_CALLS, *_STRING, *_NUMBER, *_ARRAY, *_OBJECT, *_ANY, *_REFS]
_LISTS = [{"type": "array", "items": schema, "minItems": 1, "maxItems": 2} for schema in _OBJECT]
SCHEMAS: list[Schema] = [*_CORPUS, *_LISTS][:200]
