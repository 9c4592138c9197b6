"""cropi-prompts: bring tasks and data sets into prompts.jsonl."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cropi_tools.cli.common import Force, Output, Quiet, Seed, Version, command

EXAMPLE = """
cropi-prompts reasoning-gym:chain_sum --size 500 --seed 1 -o train.jsonl
cropi-prompts reasoning-gym:gcd --size 80 --seed 2 --set max_value=99 --template 'G{numbers}=' \\
    --answer-template '{answer}' --exclude train.jsonl -o valid.jsonl
cropi-prompts hf:openai/gsm8k:main --map prompt=question --exclude test.jsonl -o gsm8k.jsonl
cropi-prompts math/train.parquet --template '{prompt} Put the answer in \\boxed{}.' --system 'Be brief.' -o math.jsonl
"""


def prompts(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="reasoning-gym:FAMILY, recipe:FILE (a family a line), hf:NAME[:CONFIG], or data: a file (JSONL, JSON, CSV, TSV, "
            "parquet, Arrow) or folder in our, verl's, TRL's or the authors' form, or any with --map.",
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
    split: Annotated[
        str | None, typer.Option("--split", help="Split of a folder or of hf:NAME (there train, unless given).")
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="Columns of data: prompt=question,answer=reward.gold,source=...,id=...,verifier=...; may be repeated.",
            metavar="NAME=COLUMN,...",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="Shapes the question: {question} or the task's fields, as in 'G{numbers}='; of data {prompt} or its columns.",
        ),
    ] = None,
    answer_template: Annotated[
        str | None, typer.Option("--answer-template", help="Shapes the answer: '{answer:nospace,lower}'.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message before every prompt.")] = None,
    template_kwargs: Annotated[
        list[str] | None,
        typer.Option(
            "--chat-template-kwargs",
            help="For the policy's chat template, such as enable_thinking=false; may be repeated.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    last_assistant: Annotated[
        Literal["refuse", "drop", "continue"],
        typer.Option("--last-assistant", help="A last message of the assistant's: a solution, or how to begin?"),
    ] = "refuse",
    source: Annotated[
        str | None, typer.Option("--source", help="Name of the source in the records, and of ids that data lacks.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Only these sources of a recipe; may be repeated.", metavar="SOURCE"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="Leave out questions that stand in this file; may be repeated.", metavar="FILE"),
    ] = None,
    check_overlap: Annotated[
        list[str] | None,
        typer.Option(
            "--check-overlap", help="Say how many questions stand in this file too; may be repeated.", metavar="FILE"
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Make prompts.jsonl from reasoning-gym's generated tasks or from data.

    Questions that come twice are dropped, compared without case and white space; --exclude keeps whole files apart, which different
    seeds do not.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import as_text, numbered, parse_named, stoppable
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.prompts.datasets import has_splits, inputs_of, open_dataset
    from cropi_tools.prompts.duplicates import Exclusion
    from cropi_tools.prompts.row_formats import parse_mapping, prompt_texts
    from cropi_tools.prompts.sources import FAMILY, RECIPE, Gathering, kind_of_source
    from cropi_tools.prompts.templates import Dressing, parse_kwargs
    from cropi_tools.runtime.errors import InputError, UsageError

    runtime.set_quiet(quiet)
    kinds = [kind_of_source(text) for text in sources]
    if FAMILY in kinds and size is None:
        raise UsageError("reasoning-gym makes as many prompts as asked for: give --size")
    data = [text for text, kind in zip(sources, kinds, strict=True) if kind == "data"]
    for option, given, used, what in (
        ("--set", settings, FAMILY in kinds, "reasoning-gym:FAMILY"),
        ("--only", only, RECIPE in kinds, "recipe:FILE"),
        ("--map", mapping, data, "data"),
        ("--split", split, any(map(has_splits, data)), "a folder or hf:NAME"),
    ):
        if given and not used:
            raise UsageError(f"{option} is for {what}, which is not among the sources")
    chosen = dict(parse_named(text, "--set", "KEY=VALUE") for text in settings or [])
    given_texts = {"--template": template, "--answer-template": answer_template, "--system": system}
    texts = {option: None if text is None else as_text(text, option) for option, text in given_texts.items()}
    for option, text in texts.items():
        if text is not None and not text.strip():
            raise UsageError(f"{option} is empty; leave it out")
    template, answer_template, system = texts.values()
    template_kwargs = [as_text(text, "--chat-template-kwargs") for text in template_kwargs or []]
    columns = parse_mapping(",".join(mapping)) if mapping else {}
    dressing = Dressing(system, template, answer_template, parse_kwargs(template_kwargs), last_assistant)
    datasets = {name: open_dataset(name, split if has_splits(name) else None) for name in data}
    others = {name: open_dataset(name) for name in [*(exclude or []), *(check_overlap or [])]}
    inputs = {
        **inputs_of("data", [datasets[name] for name in data]),
        **numbered("recipe", [text.removeprefix(RECIPE) for text in sources if text.startswith(RECIPE)]),
        **inputs_of("excluded", [others[name] for name in exclude or []]),
        **inputs_of("overlap", [others[name] for name in check_overlap or []]),
    }
    options = {
        "sources": [text if kind == FAMILY else kind for text, kind in zip(sources, kinds, strict=True)],
        "size": size,
        "seed": seed,
        "set": chosen,
        "split": split,
        "map": columns,
        "template": template,
        "answer_template": answer_template,
        "system": system,
        "chat_template_kwargs": dict(dressing.chat_template_kwargs),
        "last_assistant": last_assistant,
        "source": source,
        # ids and sources that data lacks are named after its files
        "names": None if source else [datasets[name].stem for name in data],
        "only": only,
    }
    target = JsonLinesOutput(output, Fingerprint.of("cropi-prompts", options, inputs), inputs, force)
    if not target.open():
        runtime.notify(f"{output}: up to date")
        return
    exclusion = Exclusion()
    for names, take in ((exclude, exclusion.forbid), (check_overlap, exclusion.watch)):
        for name in names or []:
            take(name, prompt_texts(others[name], columns))
    gathering = Gathering(dressing, datasets, columns, chosen, size, seed, source, only or (), exclusion)
    for text, kind in zip(sources, kinds, strict=True):
        before = target.lines
        target.append(stoppable(gathering.prompts(text)))
        if size is not None and kind != RECIPE and exclusion.met and target.lines - before < size:
            settings_said = " at these settings" if kind == FAMILY else ""
            runtime.warn(f"{text} has only {target.lines - before} further questions{settings_said}, not {size}")
    if not exclusion.met:
        raise InputError(f"{', '.join(sources)}: holds no record")
    if not target.lines:
        raise InputError(
            f"no prompt is left: {exclusion.excluded} are in the excluded files, {exclusion.exact + exclusion.normalised} are repetitions"
        )
    target.finish(skipped=exclusion.skipped(), facts=exclusion.facts())
    runtime.notify(f"{output}: {target.lines} prompts ({exclusion.in_words()})")
    for sentence in exclusion.warnings():
        runtime.warn(sentence)


main = command(prompts, name="cropi-prompts", example=EXAMPLE)
