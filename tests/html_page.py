"""A page read back, to say what is on it."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.html = html
        self.texts: list[str] = []
        self.inside: list[tuple[str, ...]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            self.inside.append(tuple(self.open))

    def headings(self) -> list[str]:
        """Texts of the sections' headings."""
        return self.of("h2")

    def of(self, *path: str) -> list[str]:
        """Texts whose innermost elements are these."""
        return [text for text, inside in zip(self.texts, self.inside, strict=True) if inside[-len(path) :] == path]

    def stands_alone(self) -> bool:
        """Whether nothing on the page would be fetched from elsewhere."""
        fetched = ("img", "iframe", "object", "embed")
        refers = [(key, value) for _, attributes in self.elements for key, value in attributes.items()]
        return (
            not any(element in fetched for element, _ in self.elements)
            and not any(key in ("src", "srcset", "xlink:href") for key, _ in refers)
            and all(value == "data:," for key, value in refers if key == "href")
            and "url(" not in self.html
            and "@import" not in self.html
        )

    def not_numbers(self) -> list[str]:
        """Texts and attributes that show a number that is none."""
        values = [value for _, attributes in self.elements for value in attributes.values() if value is not None]
        shown = [text for text in self.texts if re.search(r"\b(nan|inf|None)\b", text)]
        return shown + [value for value in values if re.fullmatch(r"-?(nan|inf)%?|None", value)]
