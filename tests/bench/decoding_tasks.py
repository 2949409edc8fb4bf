"""What `tests.bench.decoding` asks for: work on a given text, where a reply repeats much of it, and free writing.

Each kind has a template; `asks` fills it with other names and numbers for each stream, so that no two prompts agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PLACES = ("Lisbon", "Lagos", "Lima", "Oslo", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Kyoto", "Dakar", "Riga")
PEOPLE = ("Ana Moreira", "Tunde Bello", "Rosa Quispe", "Ingrid Dahl", "Samir Farag", "Lucia Vega", "Minh Tran")
PRODUCTS = ("NorthGrid Atlas", "BlueKite Meter", "RiverLine Hub", "SunPort Gateway", "ClearPath Router")

REPORT = """\
The city council of {place} voted on Tuesday to build {number} kilometres of new bike lanes along the harbour. \
The project costs {cost} million dollars and is paid for by the regional transport fund. {person}, who leads the \
transport department, said that construction starts in spring and ends before the summer of next year. Shop owners on \
Harbour Street worry about parking, because {number} spaces disappear. Cyclists welcome the plan: last year the \
department counted {count} accidents on that road. The council will also lower the speed limit on Harbour Street \
from 50 to 30 kilometres per hour. A second vote on the lanes in the old town is planned for September."""

NOTES = """\
{product} Console 4.2 is here. {product} Console now shows the Device Score of each {product} Edge Node, and the \
{product} Edge Node sends its Device Score every {number} seconds. {person} from {product} Support explains that the \
Device Score falls when an {product} Edge Node is offline for more than {cost} minutes. {product} Console 3.{cost} is \
supported until March 2027; customers of {product} Console 3.{cost} write to {person} at {product} Support in \
{place}."""

DRAFT = """\
Last week we was visiting the {product} factory in {place}. {person} have shown us the new assembly line, which \
can builds {count} units per day. She explain that the machines are checked every {number} hours and that nobody was \
hurt since the line have opened. After the tour we has lunch in the canteen and discussed about the budget of {cost} \
million dollars. We agreed that {person} send us the contract until Friday. I thinks that the visit was a success, and \
I recommend to sign the contract in {place} before the end of the month."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of work: the task it is pinned to, the request's text with places to fill, and how long replies may be."""

    name: str
    task: str
    template: str
    grounded: bool
    tokens: int


KINDS: Sequence[Kind] = (
    Kind("summarize", "summarize", "List the key points of this text as bullets:\n\n" + REPORT, True, 160),
    Kind(
        "translate with glossary",
        "translate",
        "Translate into Chinese, with Device Score as 设备评分 and Edge Node as 边缘节点, and names left as they are:"
        f"\n\n{NOTES}",
        True,
        200,
    ),
    Kind(
        "qa from a text",
        "qa",
        REPORT + "\n\nWhat does the text say about the project's cost, its leader, Harbour Street and the accidents? "
        "Quote the sentences.",
        True,
        160,
    ),
    Kind("polish", "write", "Correct the mistakes in this text and change nothing else:\n\n" + DRAFT, True, 200),
    Kind("free writing", "write", "Write a story about {person}, who lost a {product} in {place}.", False, 96),
)


def asks(kind: Kind, count: int) -> list[str]:
    """`count` different requests of this kind."""
    return [kind.template.format_map(_filling(index)) for index in range(count)]


def _filling(index: int) -> Mapping[str, str]:
    person = PEOPLE[index % len(PEOPLE)]
    return {
        "place": PLACES[index % len(PLACES)],
        "person": person,
        "product": PRODUCTS[index % len(PRODUCTS)],
        "number": str(11 + index % 17),
        "cost": str(3 + index % 6),
        "count": str(21 + index * 7 % 60),
    }


def facts(index: int, kind: Kind, reply: str) -> float:
    """The share of the names and numbers of the `index`th request's text that a reply to it has."""
    wanted = [value for name, value in _filling(index).items() if f"{{{name}}}" in kind.template]
    return sum(value in reply for value in wanted) / len(wanted)
