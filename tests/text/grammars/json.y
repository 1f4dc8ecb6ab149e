%%
value : object | array | STRING | NUMBER | 'true' | 'false' | 'null' ;
object : '{' members '}' | '{' '}' ;
members : members ',' member | member ;
member : STRING ':' value ;
array : '[' values ']' | '[' ']' ;
values : values ',' value | value ;
STRING : /"([^"\\\x00-\x1f]|\\["\\bfnrt\/])*"/ ;
NUMBER : /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/ ;
SKIP : /[ \n]+/ ;
