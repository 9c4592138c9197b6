"""cropi-prompts: bring tasks and data sets into prompts.jsonl."""

from __future__ import annotations

from cropi_tools.cli.entry import entry
from cropi_tools.prompts.options import FAMILY, RECIPE, PromptsOptions, has_splits

EXAMPLE = """
cropi-prompts reasoning-gym:chain_sum --size 500 --seed 1 -o train.jsonl
cropi-prompts reasoning-gym:gcd --size 80 --seed 2 --set max_value=99 --template 'G{numbers}=' \\
    --answer-template '{answer}' --exclude train.jsonl -o valid.jsonl
cropi-prompts hf:openai/gsm8k:main --map prompt=question --exclude test.jsonl -o gsm8k.jsonl
cropi-prompts math/train.parquet --template '{prompt} Put the answer in \\boxed{}.' --system 'Be brief.' -o math.jsonl
"""


def prompts(options: PromptsOptions) -> None:
    """Make prompts.jsonl from reasoning-gym's generated tasks or from data.

    Questions that come twice are dropped, compared without case and white space; --exclude keeps whole files apart, which different
    seeds do not.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import stoppable
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint, numbered
    from cropi_tools.prompts.datasets import inputs_of, open_dataset
    from cropi_tools.prompts.duplicates import Exclusion
    from cropi_tools.prompts.row_formats import parse_mapping, prompt_texts
    from cropi_tools.prompts.sources import SourceReader
    from cropi_tools.prompts.templates import PromptTemplate, parse_kwargs
    from cropi_tools.prompts.worked_examples import read_examples
    from cropi_tools.runtime.errors import InputError

    columns = parse_mapping(",".join(options.mapping)) if options.mapping else {}
    prompt_template = PromptTemplate(
        options.system,
        options.template,
        options.answer_template,
        parse_kwargs(options.template_kwargs),
        options.last_assistant,
        read_examples(options.messages) if options.messages else (),
    )
    datasets = {name: open_dataset(name, options.split if has_splits(name) else None) for name in options.data}
    others = {name: open_dataset(name) for name in [*options.exclude, *options.check_overlap]}
    inputs = {
        **inputs_of("data", [datasets[name] for name in options.data]),
        **numbered("recipe", options.recipes),
        **inputs_of("excluded", [others[name] for name in options.exclude]),
        **inputs_of("overlap", [others[name] for name in options.check_overlap]),
        **numbered("messages", [options.messages] if options.messages else []),
    }
    names = [datasets[name].stem for name in options.data]
    decisive = options.decisive(columns, prompt_template.chat_template_kwargs, names)
    fingerprint = Fingerprint.of("cropi-prompts", decisive, inputs)
    target = JsonLinesOutput(options.output, fingerprint, inputs, options.force)
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return
    exclusion = Exclusion()
    for files, take in ((options.exclude, exclusion.forbid), (options.check_overlap, exclusion.watch)):
        for name in files:
            take(name, prompt_texts(others[name], columns))
    reader = SourceReader(
        prompt_template,
        datasets,
        columns,
        dict(options.settings),
        options.size,
        options.seed,
        options.source,
        options.only,
        exclusion,
    )
    for text, kind in zip(options.sources, options.kinds, strict=True):
        before = target.lines
        target.append(stoppable(reader.prompts(text)))
        found, size = target.lines - before, options.size
        if size is not None and kind != RECIPE and exclusion.met and found < size:
            at_settings = " at these settings" if kind == FAMILY else ""
            runtime.warn(f"{text} has only {found} further questions{at_settings}, not {size}")
    if not exclusion.met:
        raise InputError(f"{', '.join(options.sources)}: holds no record")
    if not target.lines:
        raise InputError(
            f"no prompt is left: {exclusion.excluded} are in the excluded files, {exclusion.exact + exclusion.normalized} are repetitions"
        )
    target.finish(skipped=exclusion.skipped(), facts=exclusion.facts())
    runtime.notify(f"{options.output}: {target.lines} prompts ({exclusion.in_words()})")
    if reader.shaped:
        runtime.notify(
            f"{reader.shaped} of them have the verifier exact, since a template shapes them and reasoning-gym's scorer knows only its own form: "
            "a response must be the answer to the letter, or hold it in <answer> tags; --verifier of the later commands chooses another"
        )
    for sentence in exclusion.warnings():
        runtime.warn(sentence)


main = entry(PromptsOptions, prompts, name="cropi-prompts", example=EXAMPLE)
