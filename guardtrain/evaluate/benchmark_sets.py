"""The table of public guard benchmarks, and what an entry says.

`checked` tells against what a set's columns, splits and licence were compared in November 2026: cards on Hugging Face and
public evaluation code, as search engines keep them; the hub itself could not be reached. "GuardBench" is the package
guardbench 1.0.1, which loads the set in the same way. Where `verified` is false no such source was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from guardtrain.config import Source
from guardtrain.data.problems import Problem
from guardtrain.data.records import Record
from guardtrain.evaluate import benchmark_rows as rows
from guardtrain.types import Label

Axis = Literal["harm", "injection", "over-refusal"]
AXES: tuple[Axis, ...] = ("harm", "injection", "over-refusal")
BOTH = (Label.MALICIOUS, Label.BENIGN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One public set.

    hub: its parts on Hugging Face, each with config, split, columns (ours to theirs), labels; none where it is not there.
    files: the same parts in a copy, each `path` the file's name upstream; a lone file may have any name.
    axis: what a result on it speaks of; results of different axes are never averaged. classes: the labels it has.
    licence: SPDX; "gated: …" where terms must be accepted first, "unknown" where none is declared.
    row: for labels that are no plain column. needs: columns that must be there for it; `a|b`: one of the two.
    assemble: for sets that are put together from several files of a folder.
    """

    title: str
    axis: Axis
    classes: tuple[Label, ...]
    licence: str
    checked: str
    note: str
    hub: tuple[Source, ...] = ()
    files: tuple[Source, ...] = ()
    revision: str | None = None
    verified: bool = True
    row: Callable[[Mapping[str, Any]], dict[str, Any] | str] | None = None
    needs: tuple[str, ...] = ()
    assemble: Callable[[Path], Iterator[Record | Problem]] | None = None

    @property
    def headline(self) -> tuple[str, ...]:
        """The measures to report, by their names in `Measures`. Where a class is absent only a rate at the frozen threshold
        means anything."""
        if self.classes == (Label.MALICIOUS,):
            return ("recall",)
        rate = ("false_positive_rate",) if self.axis == "over-refusal" else ()
        return rate if self.classes == (Label.BENIGN,) else (*rate, "auroc", "recall_at_1_fpr")

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a user must know before they quote a figure."""
        unverified = () if self.verified else (f"its columns could not be verified ({self.checked})",)
        return (*unverified, self.note)


def _copy(part: Source, file: str, **changes: Any) -> Source:
    """The part `part` as the file `file` of a copy."""
    return replace(part, path=file, config=None, **changes)


TOXIC_CHAT = Source(
    path="lmsys/toxic-chat",
    config="toxicchat0124",
    split="test",
    columns={"prompt": "user_input", "label": "toxicity", "id": "conv_id"},
)
MODERATION = Source(path="mmathys/openai-moderation-api-evaluation")
AEGIS_1 = Source(path="nvidia/Aegis-AI-Content-Safety-Dataset-1.0", split="test")
AEGIS_2 = Source(path="nvidia/Aegis-AI-Content-Safety-Dataset-2.0", split="test")
WILDGUARD = Source(path="allenai/wildguardmix", config="wildguardtest", split="test")
HARMBENCH = Source(path="walledai/HarmBench", config="standard")
JBB_COLUMNS = {"prompt": "Goal", "category": "Category"}
JBB = Source(path="JailbreakBench/JBB-Behaviors", config="behaviors", split="harmful", label="malicious", columns=JBB_COLUMNS)
JBB_BENIGN = replace(JBB, split="benign", label="benign")
SAFETY_TESTS = Source(
    path="Bertievidgen/SimpleSafetyTests",
    split="test",
    label="malicious",
    columns={"prompt": "prompt", "id": "id", "category": "harm_area"},
)
DEEPSET = Source(path="deepset/prompt-injections", split="test", columns={"prompt": "text", "label": "label"})
SAFE_GUARD = replace(DEEPSET, path="xTRam1/safe-guard-prompt-injection")
ROGUE = replace(DEEPSET, path="rogue-security/prompt-injections-benchmark")
JAILBREAKS = replace(DEEPSET, path="jackhhao/jailbreak-classification", columns={"prompt": "prompt", "label": "type"})
GANDALF = Source(path="Lakera/gandalf_ignore_instructions", split="test", label="malicious", columns={"prompt": "text"})
GANDALF_SUMMARIES = replace(GANDALF, path="Lakera/gandalf_summarization")
XSTEST = Source(path="Paul/XSTest")
OR_BENCH = Source(
    path="bench-llm/or-bench",
    config="or-bench-hard-1k",
    label="benign",
    columns={"prompt": "prompt", "category": "category"},
)
NOT_INJECT = tuple(
    Source(
        path="leolee99/NotInject",
        split=f"NotInject_{number}",
        label="benign",
        columns={"prompt": "prompt", "category": "category"},
    )
    for number in ("one", "two", "three")
)

BENCHMARKS: dict[str, Benchmark] = {
    # Harm: what the user asks for.
    "toxicchat": Benchmark(
        title="ToxicChat 0124, test",
        axis="harm",
        classes=BOTH,
        hub=(TOXIC_CHAT,),
        files=(_copy(TOXIC_CHAT, "toxic-chat_annotation_test.csv"),),
        revision="3e0319203c7162b9c9f8015b594441f979c199bc",
        licence="CC-BY-NC-4.0",
        checked="the card at this revision (configurations, features); GuardBench",
        note="the label is `toxicity`; `jailbreaking` is a second one that most published figures ignore. 7 % are malicious, "
        "and figures on toxicchat1123 are not comparable",
    ),
    "openai-moderation": Benchmark(
        title="OpenAI Moderation evaluation set",
        axis="harm",
        classes=BOTH,
        hub=(MODERATION,),
        files=(_copy(MODERATION, "samples-1680.jsonl"),),
        revision="84e5cf3bcd6acb3dfc70b6760451645872218a3e",
        licence="MIT",
        checked="the file list of the hub copy; GuardBench (category columns, any of them makes a row malicious)",
        note="upstream's file is packed: gunzip samples-1680.jsonl.gz. Categories that nobody annotated count as absent, so "
        "some benign labels are wrong; most texts are statements, not requests",
        row=rows.openai_moderation_row,
        needs=("prompt",),
    ),
    "aegis-1": Benchmark(
        title="Aegis (Nemotron) Content Safety 1.0, test",
        axis="harm",
        classes=BOTH,
        hub=(AEGIS_1,),
        files=(_copy(AEGIS_1, "test.parquet"),),
        licence="CC-BY-4.0",
        checked="the card's front matter (licence); three public loaders (text, text_type, labels_0 to labels_4, test split)",
        note="labels are the majority of up to five annotators, ties malicious; `Needs Caution` counts as malicious, as in "
        "the defensive model of its authors. Dialogues and responses are left out",
        row=rows.aegis_1_row,
        needs=("text", "text_type", "labels_0"),
    ),
    "aegis-2": Benchmark(
        title="Aegis (Nemotron) Content Safety 2.0, test",
        axis="harm",
        classes=BOTH,
        hub=(AEGIS_2,),
        files=(_copy(AEGIS_2, "test.json"),),
        licence="CC-BY-4.0",
        checked="a copy of the card (columns, redaction); the hub viewer (1,964 test rows); two public loaders (labels)",
        note="the label is that of the prompt; prompts that read REDACTED must be fetched elsewhere and are left out",
        row=rows.aegis_2_row,
        needs=("prompt", "prompt_label"),
    ),
    "wildguardtest": Benchmark(
        title="WildGuardTest",
        axis="harm",
        classes=BOTH,
        hub=(WILDGUARD,),
        files=(_copy(WILDGUARD, "wildguard_test.parquet"),),
        licence="gated: ODC-BY-1.0 under AI2's Responsible Use Guidelines",
        checked="the card (configuration, split, licence, terms); three public loaders (prompt_harm_label, null labels)",
        note="log in and accept the terms first. Rows without an agreed prompt label are left out",
        row=rows.wildguard_row,
        needs=("prompt", "prompt_harm_label"),
    ),
    "harmbench": Benchmark(
        title="HarmBench behaviours, standard and contextual",
        axis="harm",
        classes=(Label.MALICIOUS,),
        hub=(HARMBENCH, replace(HARMBENCH, config="contextual")),
        files=(_copy(HARMBENCH, "harmbench_behaviors_text_test.csv"),),
        licence="MIT",
        checked="GuardBench (columns of upstream's CSV); public loaders of the hub copy (configurations; prompt, context)",
        note="the hub copy holds validation and test behaviours and now asks for terms to be accepted; upstream's CSV of the "
        "test behaviours is the one to quote. Copyright behaviours are left out: nothing in their text is an attack",
        row=rows.harmbench_row,
        needs=("Behavior|prompt",),
    ),
    "jailbreakbench": Benchmark(
        title="JailbreakBench behaviours",
        axis="harm",
        classes=BOTH,
        hub=(JBB, JBB_BENIGN),
        files=(_copy(JBB, "harmful-behaviors.csv"), _copy(JBB_BENIGN, "benign-behaviors.csv")),
        licence="MIT",
        checked="GuardBench (configuration, splits, columns); public loaders (file names)",
        note="100 goals and 100 harmless ones on the same topics, plain requests without a jailbreak around them",
    ),
    "simplesafetytests": Benchmark(
        title="SimpleSafetyTests",
        axis="harm",
        classes=(Label.MALICIOUS,),
        hub=(SAFETY_TESTS,),
        files=(_copy(SAFETY_TESTS, "SimpleSafetyTests.csv"),),
        licence="CC-BY-2.0",
        checked="GuardBench and unitxt (columns, split); GuardBench says CC-BY-4.0, a list of sets and a mirror CC-BY-2.0",
        note="100 blunt prompts: a floor that any guard should clear, and one row is a whole point",
    ),
    # Injection: text that gives orders to the model that reads it.
    "bipia-email": Benchmark(
        title="BIPIA, emails with planted text attacks",
        axis="injection",
        classes=BOTH,
        files=(Source(path=rows.BIPIA_CONTEXTS), Source(path=rows.BIPIA_ATTACKS)),
        licence="MIT",
        checked="the code of microsoft/BIPIA at 5a48626 (columns, insertion at end, start and middle; 5 texts an attack)",
        note="PATH is the repository's folder `benchmark`. Each pair of email and attack is built once, its position in turn, "
        "so rows are not upstream's; few emails repeat often, so intervals must be drawn by email. Its clean emails are in "
        "some training mixtures",
        assemble=rows.bipia_records,
    ),
    "deepset-injections": Benchmark(
        title="deepset prompt-injections, test",
        axis="injection",
        classes=BOTH,
        hub=(DEEPSET,),
        files=(_copy(DEEPSET, "test.parquet"),),
        licence="Apache-2.0",
        checked="the card (columns, 116 test rows, licence)",
        note="English and German. Some rows labelled 1 are plain questions or role play; many detectors were trained on it",
    ),
    "safe-guard-injections": Benchmark(
        title="safe-guard prompt injection, test",
        axis="injection",
        classes=BOTH,
        hub=(SAFE_GUARD,),
        files=(_copy(SAFE_GUARD, "test.parquet"),),
        licence="unknown",
        checked="two public evaluations (text, label; 2,060 test rows, 650 malicious)",
        note="no licence is declared: do not redistribute. Synthetic, and many detectors were trained on its train split",
    ),
    "rogue-injections": Benchmark(
        title="Rogue Security (formerly Qualifire) prompt injections",
        axis="injection",
        classes=BOTH,
        hub=(ROGUE,),
        files=(_copy(ROGUE, "test.csv"),),
        licence="gated: CC-BY-NC-4.0",
        checked="public loaders (test.csv; text, label jailbreak or benign; renamed; gated)",
        note="log in and accept the terms first. Many benign rows are long and odd",
    ),
    "jailbreak-classification": Benchmark(
        title="jailbreak-classification, test",
        axis="injection",
        classes=BOTH,
        hub=(JAILBREAKS,),
        files=(_copy(JAILBREAKS, "jailbreak_dataset_test.csv"),),
        licence="Apache-2.0",
        checked="two public loaders (prompt, type jailbreak or benign; test split); the file's name was not found",
        note="attacks are the long jailbreaks that every collection holds: look at contamination first. Benign rows give an "
        "assistant a role, and are often flagged",
    ),
    "gandalf": Benchmark(
        title="Gandalf ignore-instructions, test",
        axis="injection",
        classes=(Label.MALICIOUS,),
        hub=(GANDALF,),
        files=(_copy(GANDALF, "test.parquet"),),
        licence="MIT",
        checked="the card (columns, 112 test rows, licence)",
        note="players' attempts at one game, chosen for their likeness to one phrase",
    ),
    "gandalf-summarization": Benchmark(
        title="Gandalf summarization, test",
        axis="injection",
        classes=(Label.MALICIOUS,),
        hub=(GANDALF_SUMMARIES,),
        files=(_copy(GANDALF_SUMMARIES, "test.parquet"),),
        licence="MIT",
        checked="public loaders know its splits and licence, none names its columns: `text` is taken from its sister set",
        verified=False,
        note="texts that make a summary give the password away",
    ),
    # Over-refusal: what is harmless and looks as if it were not.
    "xstest": Benchmark(
        title="XSTest v2",
        axis="over-refusal",
        classes=BOTH,
        hub=(XSTEST,),
        files=(_copy(XSTEST, "xstest_prompts.csv"),),
        licence="CC-BY-4.0",
        checked="GuardBench (types that begin with contrast are unsafe); public loaders of the hub copy (prompt, type; 250 "
        "safe, 200 unsafe)",
        note="its 200 unsafe contrasts are plain harmful requests, so AUROC speaks of harm; quote false alarms first",
        row=rows.xstest_row,
        needs=("prompt", "type"),
    ),
    "or-bench-hard": Benchmark(
        title="OR-Bench hard 1K",
        axis="over-refusal",
        classes=(Label.BENIGN,),
        hub=(OR_BENCH,),
        files=(_copy(OR_BENCH, "or-bench-hard-1k.csv"),),
        licence="CC-BY-4.0",
        checked="the card (configuration, split, columns, licence)",
        note="rows were written and judged harmless by models: some are doubtful",
    ),
    "notinject": Benchmark(
        title="NotInject",
        axis="over-refusal",
        classes=(Label.BENIGN,),
        hub=NOT_INJECT,
        files=tuple(_copy(part, f"{part.split}.json") for part in NOT_INJECT),
        revision="a2c2e336bea79d99e9fa24707c960081da3a9726",
        licence="MIT",
        checked="the card and file list at this revision (columns, splits, licence); the evaluation code of its authors",
        note="339 harmless prompts with one, two or three words that injections use; figures per split differ much",
    ),
}
