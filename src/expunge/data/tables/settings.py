"""What a table is made of: which column is what, and how images and texts become numbers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from expunge.core.errors import InputError
from expunge.core.settings import Settings


class Reading(Settings):
    """How rows are read; see :func:`expunge.data.tables.read_table`."""

    name: ClassVar[str] = "table"

    target: str | None = Field(None, description="column to predict; of a folder for each class: the folder")
    id: str | None = Field(
        None, description="column of unique names; none: the path of an image, else the number of the row, from 0"
    )
    subject: str | None = Field(None, description="column that names the person, patient or device a row belongs to")
    features: tuple[str, ...] | None = Field(
        None, description="columns that the model reads, in this order; none: all that have no other part"
    )
    image: str | None = Field(None, description="column of images: paths, files as bytes, pixels, or pictures")
    text: str | None = Field(None, description="column of texts, which a tokenizer turns into token ids")
    columns: tuple[str, ...] | None = Field(
        None, description="columns kept for conditions but not read by the model; none: all that have no other part"
    )
    task: Literal["classification", "regression"] = Field("classification", description="what is predicted")
    classes: tuple[str, ...] | None = Field(
        None, description="names of the classes in the order of the model's outputs; a class may then have no row; none: found"
    )
    folder: Path | None = Field(None, description="folder that holds the images of a column of paths; none: that of the file")
    size: tuple[int, int] | None = Field(
        None, description="height and width that images are resized to (bilinear, proportions are not kept); none: as they are"
    )
    grayscale: bool = Field(False, description="one channel of brightness in the place of red, green and blue")
    mean: tuple[float, ...] | None = Field(None, description="subtracted from each channel, which lies in [0, 1]")
    std: tuple[float, ...] | None = Field(None, description="each channel is divided by it, after the mean is subtracted")
    max_length: int | None = Field(None, ge=1, description="most tokens of a text; the rest is cut; none: the tokenizer's limit")
    precision: Literal["float32", "float64"] = Field("float32", description="of inputs, and of the targets of a regression")

    @field_validator("features", "columns", "classes", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        """A single name stands for a list of one; class names may be given as numbers."""
        if isinstance(value, str):
            return (value,)
        return tuple(str(v) for v in value) if isinstance(value, (list, tuple)) else value

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Reading:
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"The size {list(self.size)} holds no pixel.", "Give a height and a width of at least 1.")
        inputs = [name for name in ("features", "image", "text") if getattr(self, name) is not None]
        if len(inputs) > 1:
            raise InputError(f"Both {inputs[0]} and {inputs[1]} say what the model reads.", "Name one of them.")
        for name in ("features", "columns", "classes"):
            held = getattr(self, name) or ()
            twice = next((v for v in held if held.count(v) > 1), None)
            if twice is not None:
                raise InputError(f"{name} names {twice!r} twice.", "Name it once.")
        if self.features is not None and not self.features:
            raise InputError("No column is named as a feature.", "Name at least one, or leave features out.")
        if self.task == "regression" and self.classes is not None:
            raise InputError("A regression has no classes.", "Leave the classes out, or ask for a classification.")
        if self.std is not None and min(self.std) <= 0:
            raise InputError("A standard deviation must be above 0.", "Correct std.")
        self._each_part_once()
        return self

    def _each_part_once(self) -> None:
        taken: dict[str, str] = {}
        parts = {"target": self.target, "id": self.id, "subject": self.subject, "image": self.image, "text": self.text}
        pairs = [(part, name) for part, name in parts.items() if name is not None]
        pairs += [("features", name) for name in self.features or ()]
        for part, name in pairs:
            if name in taken and {part, taken[name]} != {"id", "image"}:
                raise InputError(f"The column {name!r} is given as {taken[name]} and as {part}.", "Give each column one part.")
            taken.setdefault(name, part)
