"""Special tokens of a tokenizer, told apart from texts that are only written like them."""

import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..format.prompt import Part


class ControlTokens:
    """The tokens that a tokenizer takes out of a text before it splits the rest.

    `special` has those that it calls special, such as <|im_end|>; `others` those that it takes for
    ordinary text otherwise, such as <think>, without blanks. Both map their text to their id.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        known = {t.content: (i, t) for i, t in added.items() if t.content.strip()}
        self.special = {text: i for text, (i, token) in known.items() if token.special}
        self.others = {text: i for text, (i, token) in known.items() if not token.special}
        self._pattern = any_of(known)
        self._private = PrivateTokenizer.of(tokenizer, known, self._pattern)

    def listed(self, text: str) -> list[str]:
        """Returns the texts of those that the tokenizer would make of `text`, special or not."""
        return self._pattern.findall(text)

    def found_in(self, text: str) -> dict[str, int]:
        """Returns the ids of those that the tokenizer would make of `text`, special or not."""
        ids = self.special | self.others
        return {found: ids[found] for found in self.listed(text)}

    def encode(self, parts: Iterable[Part], control: Collection[str]) -> list[int] | None:
        """Returns the ids of the parts in a row, in whose contents no token of `control` occurs.

        What is written like one there is encoded as the text that it is. Returns None for a
        tokenizer with which that cannot be done.
        """
        return None if self._private is None else self._private.encode(parts, control)


class PrivateTokenizer:
    """A tokenizer over the same model, in which the tokens have names that nobody can write.

    So the library itself does all that it does beside: what joins up, what blanks a token takes
    with it, what the first piece of a text gets. Where the model makes a special token of its own
    accord of what is written like one, as unigram models do, a token that is dropped again parts
    the first character from the others.
    """

    @classmethod
    def of(
        cls, tokenizer: Any, known: Mapping[str, tuple[int, Any]], pattern: re.Pattern[str]
    ) -> "PrivateTokenizer | None":
        """Returns it, or None where it would not split texts as `tokenizer` does."""
        from transformers import PreTrainedTokenizerFast

        kind = type(tokenizer)
        if (
            not isinstance(tokenizer, PreTrainedTokenizerFast)
            or kind._encode_plus is not PreTrainedTokenizerFast._encode_plus
        ):
            return None
        private = cls(tokenizer.backend_tokenizer, known, pattern, tokenizer.unk_token_id)
        if any(private._backend.model.id_to_token(i) is not None for i in private._new_ids()):
            return None
        probe = "".join(f"a{text} b {text}" for text in known)
        same = private.encode([Part(probe, False)], ())
        plain = tokenizer.backend_tokenizer.encode(probe, add_special_tokens=False).ids
        return private if same == plain else None

    def __init__(
        self, backend: Any, known: Mapping[str, tuple[int, Any]], pattern: re.Pattern[str],
        unknown_id: int | None,
    ) -> None:  # fmt: skip
        from tokenizers import AddedToken, Tokenizer

        self._pattern = pattern
        secret = secrets.token_hex(8)
        self._names = {text: f"<{secret}:{i}>" for text, (i, _) in known.items()}
        self._break = f"<{secret}>"
        self._known_ids = {text: i for text, (i, _) in known.items() if i != unknown_id}
        self._backend: Any = Tokenizer(backend.model)  # which both share
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(backend, part)) is not None:
                setattr(self._backend, part, value)
        added = dict(sorted(backend.get_added_tokens_decoder().items()))
        for token_id, token in added.items():
            if (name := self._names.get(token.content)) is not None:
                added[token_id] = AddedToken(
                    name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                    normalized=False, special=True,
                )  # fmt: skip
        self._backend.add_tokens([*added.values(), AddedToken(self._break, normalized=False)])
        self._break_id = self._backend.token_to_id(self._break)
        # Here -> in the tokenizer.
        self._ids = {self._backend.token_to_id(token.content): i for i, token in added.items()}

    def _new_ids(self) -> list[int]:
        """Returns the ids, here, of what the model does not have."""
        ids: list[int] = [self._backend.token_to_id(name) for name in self._names.values()]
        return [*ids, self._backend.token_to_id(self._break)]

    def encode(self, parts: Iterable[Part], control: Collection[str]) -> list[int] | None:
        """Returns the ids of the parts in a row; see ControlTokens."""
        parts = joined(parts)
        controls = {self._known_ids[text] for text in control if text in self._known_ids}
        around = "\n".join(part.text for part in parts if not part.is_content)
        meant = (self._known_ids.get(text) for text in self._pattern.findall(around))
        num_meant = sum(token_id in controls for token_id in meant)
        for apart in ("", self._break):
            text = "".join(self._renamed(part, control, apart) for part in parts)
            found = self._backend.encode(text, add_special_tokens=False).ids
            ids = [self._ids.get(i, i) for i in found if i != self._break_id]
            if sum(i in controls for i in ids) == num_meant:
                return ids
        return None

    def _renamed(self, part: Part, control: Collection[str], apart: str) -> str:
        """Returns a part with the names of the tokens in it, but for those that are text there."""
        kept = control if part.is_content else ()

        def renamed(match: re.Match[str]) -> str:
            text = match[0]
            return f"{text[0]}{apart}{text[1:]}" if text in kept else self._names[text]

        return self._pattern.sub(renamed, part.text)


def joined(parts: Iterable[Part]) -> Sequence[Part]:
    """Returns the parts with those that stand side by side and are of one kind as one."""
    together: list[tuple[list[str], bool]] = []
    for text, is_content in parts:
        if together and together[-1][1] == is_content:
            together[-1][0].append(text)
        else:
            together.append(([text], is_content))
    return [Part("".join(texts), is_content) for texts, is_content in together]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns what finds the first of these texts, of several there the longest.

    Texts that begin alike share that beginning, as there may be thousands of them.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: Mapping[str, Any]) -> str:
        branches = [re.escape(char) + pattern(after) for char, after in node.items() if char]
        if "" not in node:
            return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{'|'.join(branches)})?" if branches else ""

    return re.compile(pattern(tree) if tree else r"(?!)")
