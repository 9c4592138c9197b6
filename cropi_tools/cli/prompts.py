"""cropi-prompts: bring tasks and data sets into prompts.jsonl."""

from __future__ import annotations

from typing import Annotated

import typer

from cropi_tools.cli.common import Force, Output, Quiet, Seed, Version, command

EXAMPLE = """
cropi-prompts reasoning-gym:chain_sum --size 500 --seed 1 -o train.jsonl
cropi-prompts reasoning-gym:gcd --size 80 --seed 2 --set max_value=99 --template 'G{numbers}=' \\
    --answer-template '{answer}' --exclude train.jsonl -o valid.jsonl
cropi-prompts gsm8k/train.parquet --source gsm8k -o gsm8k.jsonl
"""


def prompts(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="reasoning-gym:FAMILY, recipe:FILE (a family a line), or data: JSONL or parquet in our, verl's or the authors' form.",
            metavar="SOURCE",
        ),
    ],
    output: Output = "-",
    size: Annotated[
        int | None, typer.Option("--size", help="Prompts to take; for a recipe, from each of its lines.", min=1)
    ] = None,
    seed: Seed = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A difficulty setting of the family; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Shapes the question: {question} or the task's fields, as in 'G{numbers}='."),
    ] = None,
    answer_template: Annotated[
        str | None, typer.Option("--answer-template", help="Shapes the answer: '{answer:nospace,lower}'.")
    ] = None,
    source: Annotated[str | None, typer.Option("--source", help="Name of the source in the records.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Only these sources of a recipe; may be repeated.", metavar="SOURCE"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="Leave out questions that stand in this file; may be repeated.", metavar="FILE"),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Make prompts.jsonl from reasoning-gym's generated tasks or from data files.

    Questions that come twice are dropped, compared without case and white space; --exclude keeps whole files apart, which different
    seeds do not.
    """
    from itertools import islice

    from cropi_tools import runtime
    from cropi_tools.cli.common import numbered, parse_named, stoppable
    from cropi_tools.data.errors import InputError, UsageError
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.output import JsonLinesOutput
    from cropi_tools.data.sources import Exclusion, jsonl_prompts, questions, reasoning_gym_prompts, recipe_prompts

    runtime.set_quiet(quiet)
    generated = [text.removeprefix("reasoning-gym:") for text in sources if text.startswith("reasoning-gym:")]
    if generated and size is None:
        raise UsageError("reasoning-gym makes as many prompts as asked for: give --size")
    files = [text.removeprefix("recipe:") for text in sources if not text.startswith("reasoning-gym:")]
    chosen = dict(parse_named(text, "--set") for text in settings or [])
    inputs = {**numbered("data", files), **numbered("excluded", exclude or [])}
    options = {
        "generated": generated,
        "size": size,
        "seed": seed,
        "set": chosen,
        "template": template,
        "answer_template": answer_template,
        "source": source,
        "only": only,
    }
    target = JsonLinesOutput(output, Fingerprint.of("cropi-prompts", options, inputs), inputs, force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return
    exclusion = Exclusion(question for path in exclude or [] for question in questions(path))
    for text in sources:
        before = exclusion.kept
        if text.startswith("reasoning-gym:"):
            assert size is not None
            family = text.removeprefix("reasoning-gym:")
            made = reasoning_gym_prompts(
                family, size, seed, chosen, template, answer_template, source, exclusion=exclusion
            )
            target.append(stoppable(made))
            if exclusion.kept - before < size:
                runtime.warn(
                    f"{family} has only {exclusion.kept - before} further questions at these settings, not {size}"
                )
        elif text.startswith("recipe:"):
            target.append(stoppable(recipe_prompts(text.removeprefix("recipe:"), seed, size, only or (), exclusion)))
        else:
            target.append(stoppable(islice(exclusion.filter(jsonl_prompts(text, source)), size)))
    if not exclusion.kept + exclusion.excluded + exclusion.duplicates:
        raise InputError(f"{', '.join(sources)}: holds no record")
    if not target.lines:
        raise InputError(
            f"no prompt is left: {exclusion.excluded} are in the excluded files, {exclusion.duplicates} are repetitions"
        )
    target.finish(skipped={"excluded": exclusion.excluded, "duplicates": exclusion.duplicates})
    runtime.notify(
        f"{output}: {target.lines} prompts ({exclusion.excluded} excluded, {exclusion.duplicates} repetitions dropped)"
    )


main = command(prompts, name="cropi-prompts", example=EXAMPLE)
