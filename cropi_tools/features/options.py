"""What cropi-embed was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cropi_tools.data.dates import DEFAULT_DATE
from cropi_tools.options import CommandOptions, Date, Device, Dtype, Model, Option, Shard, at_least


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(CommandOptions):
    """The options of cropi-embed."""

    prompts: Annotated[tuple[str, ...], Option("FILE", "Prompts (JSONL, .gz, .zst).")]
    model: Model
    output: Annotated[
        str, Option("-o --output", "Where to write the features (X.safetensors).", metavar="FILE.safetensors")
    ]
    shard: Shard = (1, 1)
    date: Date = DEFAULT_DATE
    tokens_per_pass: Annotated[
        int,
        Option(
            "--tokens-per-pass",
            "Most tokens of prompts that go through the policy together, padding included.",
            "Device",
            "N",
            at_least(1),
        ),
    ] = 16384
    device: Device = "auto"
    dtype: Dtype = "auto"

    def decisive(self, dated: bool) -> dict[str, Any]:
        """What decides the features, besides the inputs. dated: whether prompts can have the date in them."""
        found = {"shard": "/".join(map(str, self.shard)), "dtype": self.dtype, "tokens_per_pass": self.tokens_per_pass}
        return {**found, "date": self.date} if dated else found
