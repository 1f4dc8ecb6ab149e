"""An answer as an object of a class, and as one of a few words."""

from pydantic import BaseModel

from squall import ChatCompletionRequest, Grammar, Model, Runner


class City(BaseModel):
    name: str
    country: str


with Model.open() as model:
    request = ChatCompletionRequest(
        messages="Tell me about Paris.", response_format=City, max_tokens=64, temperature=0
    )
    answer = Runner(model).send_chat_completion_request(request).choices[0].message.content
    city = City.model_validate_json(answer or "")
    print(city.name, city.country)
    kinds = Grammar.choice(["city", "river", "mountain"])
    print(model.generate("The Danube is a", grammar=kinds, temperature=0).read())
