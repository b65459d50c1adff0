"""What prompts of indirect object identification are made of: sentences with gaps, and words for them.

A template's gaps are `{first}` and `{second}`, the two people as they are introduced; `{again}`, the one who acts; and
any others, for which words are given. The other of the two people comes next.
"""

from collections.abc import Mapping, Sequence
from string import Formatter

from clearspan.errors import InvalidArgumentError

# fmt: off
NAMES = (
    "Adam", "Alice", "Amy", "Andrew", "Anna", "Ben", "Brian", "Charles", "Daniel", "David", "Edward", "Emily", "Emma",
    "Frank", "George", "Grace", "Helen", "Henry", "Jack", "James", "Jane", "John", "Julia", "Kate", "Kevin", "Laura",
    "Linda", "Lisa", "Luke", "Maria", "Mark", "Martin", "Mary", "Matthew", "Max", "Michael", "Nancy", "Oscar", "Paul",
    "Peter", "Rachel", "Richard", "Robert", "Rose", "Sam", "Sarah", "Simon", "Steven", "Susan", "Thomas", "Tom",
    "William",
)
# fmt: on
WORDS: Mapping[str, Sequence[str]] = {
    "place": ("garden", "kitchen", "library", "market", "museum", "office", "park", "school", "shop", "station"),
    "object": ("ball", "basket", "book", "box", "camera", "key", "lamp", "letter", "map", "ring"),
}
TEMPLATES = (
    "After {first} and {second} had closed the {place}, {again} handed the {object} to",
    "While {first} and {second} were waiting at the {place}, {again} passed a {object} to",
    "On Sunday {first} and {second} met near the {place}, and {again} lent a {object} to",
    "Yesterday {first} and {second} cleaned the {place}. Afterwards {again} gave the {object} to",
    "The neighbours saw {first} and {second} leave the {place}, where {again} had sold a {object} to",
    "Because {first} and {second} shared a desk at the {place}, {again} offered the {object} to",
    "It was late when {first} and {second} found the {place}, so {again} returned the {object} to",
    "In the morning {first} and {second} walked to the {place}, and {again} brought a {object} to",
)

_PEOPLE = ("first", "second", "again")


def gaps(template: str, words: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the gaps of a template that are filled from `words`.

    Raises:
        InvalidArgumentError: The three people are not there once each, in their order and after a space; another gap
            has no words; or a space stands at the end, where the answer brings its own.

    Example:
        >>> gaps(TEMPLATES[0], WORDS)
        ('place', 'object')
    """
    try:
        parts = [(text, gap) for text, gap, _, _ in Formatter().parse(template) if gap is not None]
    except ValueError as error:
        raise InvalidArgumentError(f"cannot read the template {template!r}", reason=str(error)) from error
    people = [(text, gap) for text, gap in parts if gap in _PEOPLE]
    others = tuple(dict.fromkeys(gap for _, gap in parts if gap not in _PEOPLE))
    faults = {
        "{first}, {second} and {again}, once each and in this order": [gap for _, gap in people] != list(_PEOPLE),
        "a space before each person, as names are single tokens after a space": not all(
            text.endswith(" ") for text, _ in people
        ),
        f"no gaps but the people and {', '.join(words)}": not set(others) <= {gap for gap in words if words[gap]},
        "no space at the end, where the answer brings its own": template[-1:].isspace(),
    }
    for expected, is_found in faults.items():
        if is_found:
            raise InvalidArgumentError("the template does not fit the task", expected=expected, got=repr(template))
    return others
