"""Each deliberately broken backend is caught, and by the checks whose name says what is wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import BF16, Backend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.runner import judged
from tests.conformance import ahead, broken, crossing, late, samplers
from tests.conformance.broken import BrokenBackend, around
from tests.conformance.crossing import CrossingBackend, DeviceBackend, device_with
from tests.conformance.late import LateBackend
from tests.conformance.mutants import MUTANTS
from tests.conformance.rounded import RoundedBackend
from tests.conformance.samplers import Sampling

ROUTER, EXPERTS, MLP, NORM = specs.Router, specs.Experts, specs.MLP, specs.RMSNorm
CONV, ATTENTION, HEAD = specs.ShortConv, specs.Attention, specs.LMHead

# Name of the defect: the backend that has it, and the checks that must fail.
DEFECTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "streams wait for nothing": (
        LateBackend(late.WaitsForNothing()),
        ("results-cross-streams", "batches-cross-streams"),
    ),
    "marks before the last work": (
        LateBackend(late.MarksTooEarly()),
        ("results-cross-streams",),
    ),
    "marks measure backwards": (LateBackend(late.MeasuresBackwards()), ("marks-measure-time",)),
    "marks of the first replay": (
        ahead.TimedOnce(),
        ("timed-marks-tell-of-the-newest-replay",),
    ),
    "copies when asked for": (
        LateBackend(late.CopiesWhenAsked()),
        ("copies-to-the-host-keep-their-order",),
    ),
    "copies in one buffer": (
        LateBackend(late.CopiesIntoOneBuffer()),
        ("copies-to-the-host-keep-their-order",),
    ),
    "arguments shared by threads": (
        late.SharesArguments(),
        ("threads-do-not-disturb-each-other",),
    ),
    **{
        f"padding for tokens in {kind.__name__}": (
            broken.TakesPaddingForTokens(kind),
            ("padding-rows",),
        )
        for kind in (specs.Embedding, CONV, ATTENTION)
    },
    "softmax router": (
        BrokenBackend({ROUTER: broken.SoftmaxRouter}),
        ("router-sigmoid-not-softmax", "router", "sparse-moe", "whole-model"),
    ),
    "bias in the weights": (
        BrokenBackend({ROUTER: broken.BiasInTheWeights}),
        ("router-bias-selects-but-does-not-weigh", "router"),
    ),
    "bias ignored": (
        BrokenBackend({ROUTER: broken.BiasIgnored}),
        ("router-bias-selects-but-does-not-weigh", "router"),
    ),
    "bias always asked for": (
        BrokenBackend({ROUTER: broken.BiasAlwaysAsked}),
        ("router-without-bias",),
    ),
    "never normalised": (
        BrokenBackend({ROUTER: broken.NeverNormalised}),
        ("router-normalisation", "router"),
    ),
    "always normalised": (
        BrokenBackend({ROUTER: broken.AlwaysNormalised}),
        ("router-normalisation", "router"),
    ),
    "no epsilon under the weights": (
        BrokenBackend({ROUTER: broken.NoEpsilon}),
        ("router-normalisation", "router-extreme-logits"),
    ),
    "scaling dropped": (
        BrokenBackend({ROUTER: broken.ScalingDropped}),
        ("router-scaling", "router"),
    ),
    "padded experts taken": (
        BrokenBackend({ROUTER: broken.PaddedExperts}),
        ("router-shape-grid", "router"),
    ),
    "scores in 16 bits": (
        BrokenBackend({specs.Scores: broken.ScoresIn16Bits}),
        ("scores", "router-apart-equals-together"),
    ),
    "bias in the weights of a choice": (
        BrokenBackend({specs.Choice: broken.ChoiceWeighedByTheBias}),
        ("choice", "router-apart-equals-together"),
    ),
    "choice of the higher id": (
        BrokenBackend({specs.Choice: broken.ChoiceOfTheHigherId}),
        ("choice-of-equal-scores",),
    ),
    "ties to the higher id": (BrokenBackend({ROUTER: broken.HigherIdFirst}), ("router-ties",)),
    "logarithm of the sigmoid": (
        BrokenBackend({ROUTER: broken.LogSigmoid}),
        ("router-extreme-logits",),
    ),
    "logits in bf16": (
        BrokenBackend({ROUTER: broken.Bf16Logits}),
        ("router-is-float32", "router"),
    ),
    "bias in bf16": (BrokenBackend({ROUTER: broken.Bf16Bias}), ("router-is-float32",)),
    "logits in bf16 beyond 8 rows": (
        BrokenBackend({ROUTER: broken.Bf16LogitsInLargeBatches}),
        ("router-ids-independent-of-batch-size", "batch-independence", "router"),
    ),
    "NaN scores sorted last": (
        BrokenBackend({ROUTER: broken.NaNSortedLast}),
        ("router-nan-scores",),
    ),
    "experts searched from the first": (
        BrokenBackend({ROUTER: broken.SearchedFromTheFirst}),
        ("router-nan-scores",),
    ),
    "masks clipped": (BrokenBackend({ROUTER: broken.MasksClipped}), ("router-masked-experts",)),
    "gate clamped": (
        BrokenBackend({MLP: broken.GateClamped}),
        ("non-finite-values-reach-the-result",),
    ),
    "w1 and w3 swapped": (
        broken.with_swapped_weights(),
        ("mlp-w1-is-the-gate", "mlp", "experts", "sparse-moe", "layer"),
    ),
    "empty expert crashes": (
        BrokenBackend({EXPERTS: broken.EmptyExpertCrashes}),
        ("moe-empty-expert",),
    ),
    "experts summed in the order of ids": (
        BrokenBackend({EXPERTS: broken.SummedInIdOrder}),
        ("experts-split-by-slot-bitwise",),
    ),
    "experts summed in float64": (
        BrokenBackend({EXPERTS: broken.SummedInFloat64}),
        ("experts-split-by-slot-bitwise",),
    ),
    "all experts read": (
        BrokenBackend({EXPERTS: broken.reads_all_experts}),
        ("experts-local-ids",),
    ),
    "local experts are a range": (
        BrokenBackend({EXPERTS: broken.LocalExpertsAreARange}),
        ("experts-local-ids",),
    ),
    "some expert is local": (
        BrokenBackend({EXPERTS: broken.SomeExpertIsLocal}),
        ("experts-none-local",),
    ),
    "nobody is the last expert": (
        BrokenBackend({EXPERTS: broken.NobodyIsTheLastExpert}),
        ("experts-nobody-adds-nothing",),
    ),
    "nobody weighed by 0": (
        BrokenBackend({EXPERTS: broken.NobodyWeighedByZero}),
        ("experts-nobody-adds-nothing",),
    ),
    "experts of others are refused": (
        BrokenBackend({EXPERTS: broken.OthersAreRefused}),
        ("experts-of-others-add-nothing", "experts-none-local"),
    ),
    "an expert of others is the last one": (
        BrokenBackend({EXPERTS: broken.OthersAreTheLastExpert}),
        ("experts-of-others-add-nothing",),
    ),
    "experts of others weighed by 0": (
        BrokenBackend({EXPERTS: broken.OthersWeighedByZero}),
        ("experts-of-others-add-nothing",),
    ),
    "nobody ends the row": (
        BrokenBackend({EXPERTS: broken.NobodyEndsTheRow}),
        ("experts-nobody-adds-nothing", "experts-split-by-slot-bitwise"),
    ),
    "interleaved RoPE": (
        BrokenBackend({ATTENTION: broken.InterleavedRope}),
        ("rope-rotates-halves", "attention"),
    ),
    "RoPE before norm": (
        BrokenBackend({ATTENTION: broken.RopeBeforeNorm}),
        ("norm-before-rope", "attention"),
    ),
    "theta of 10000": (BrokenBackend({ATTENTION: broken.ThetaOfTenThousand}), ("rope-theta",)),
    "positions in bf16": (
        BrokenBackend({ATTENTION: broken.PositionsInBf16}),
        ("rope-beyond-position-1000",),
    ),
    "no maximum subtracted": (
        BrokenBackend({ATTENTION: broken.NoMaximumSubtracted}),
        ("attention-large-scores",),
    ),
    "key heads taken in turn": (BrokenBackend({ATTENTION: broken.HeadsInTurn}), ("attention",)),
    "the next row seen": (
        BrokenBackend({ATTENTION: broken.SeesTheNextRow}),
        ("attention-is-causal", "attention"),
    ),
    "the future weighed by 0": (
        BrokenBackend({ATTENTION: broken.FutureWeighedByZero}),
        ("attention-is-causal",),
    ),
    "conv state not reset": (
        BrokenBackend({CONV: broken.ConvStateNotReset}),
        ("state-fresh-at-position-zero",),
    ),
    "conv state padded from the page": (
        BrokenBackend({CONV: broken.ConvPaddedFromThePage}),
        ("state-fresh-at-position-zero",),
    ),
    "attention reads whole pages": (
        around(ATTENTION, broken.AttentionReadsWholePages),
        ("state-fresh-at-position-zero",),
    ),
    "conv leaks over boundaries": (
        BrokenBackend({CONV: broken.ConvLeaksOverBoundaries}),
        ("short-conv", "batch-independence", "whole-model-batch-independence"),
    ),
    "short chunk loses taps": (
        BrokenBackend({CONV: broken.ConvShortChunkLosesTaps}),
        ("state-chunked-equals-one-shot", "state-decode-batch", "whole-model-decodes"),
    ),
    "pages are rows of the batch": (
        around(CONV, broken.PagesAreRowsOfTheBatch),
        ("state-decode-batch", "state-random-schedule", "whole-model-decodes"),
    ),
    "two pages are one": (
        around(ATTENTION, broken.TwoPagesAreOne),
        ("state-pages-do-not-leak", "state-random-schedule"),
    ),
    "fresh if the first is": (
        around(CONV, broken.FreshIfTheFirstIs),
        ("state-prefill-beside-decode",),
    ),
    "no state": (BrokenBackend({CONV: broken.without_new_state}), ("operator-has-state",)),
    "a window without steps back": (
        BrokenBackend({CONV: broken.WindowTooShort}),
        ("state-steps-back",),
    ),
    "pages of 64 tokens only": (around(ATTENTION, broken.PagesOf64), ("state-page-sizes",)),
    "positions in 16 bits": (
        around(ATTENTION, broken.PositionsIn16Bits),
        ("state-positions-beyond-32768",),
    ),
    "a fork writes the page that it shares": (
        around(ATTENTION, broken.ForkWritesItsFirstPage),
        ("state-forks-share-pages",),
    ),
    "NaN for one row": (
        around(MLP, broken.NaNForOneRow),
        ("outputs-finite", "mlp", "batch-independence"),
    ),
    "NaN for rows of zeros": (
        BrokenBackend({NORM: broken.NaNForZeroRows}),
        ("outputs-finite", "norm"),
    ),
    "no rows crash": (around(MLP, broken.NoRowsCrashes), ("zero-rows", "mlp")),
    "perturbed by the number of rows": (
        around(MLP, broken.PerturbedByTheNumberOfRows),
        ("batch-independence",),
    ),
    "another sum for many rows": (
        BrokenBackend({MLP: broken.OtherSumForManyRows}),
        ("batch-independence", "whole-model-batch-independence"),
    ),
    "writes its input": (around(MLP, broken.WritesItsInput), ("inputs-not-written",)),
    "writes the batch": (around(CONV, broken.WritesTheBatch), ("inputs-not-written",)),
    "adds into delta": (BrokenBackend({NORM: broken.AddsIntoDelta}), ("inputs-not-written",)),
    "writes its weights": (BrokenBackend({MLP: broken.WritesItsWeights}), ("mlp",)),
    "one buffer for all blocks": (
        around(MLP, broken.SharedBuffer),
        ("results-belong-to-the-caller",),
    ),
    "fills only what is not zero": (
        around(EXPERTS, broken.FillsOnlyValues),
        ("filled-results-have-the-same-bits",),
    ),
    "stale scratch": (around(MLP, broken.StaleScratch), ("scratch-is-not-seen",)),
    "a race": (around(MLP, broken.RaceBetweenCalls), ("repeatable",)),
    "float64 result": (
        around(MLP, broken.Float64Result),
        ("output-dtype-and-shape", "results-are-plain-arrays"),
    ),
    "raw bits of BF16": (BrokenBackend({HEAD: broken.RawBits}), ("bf16-and-f16-weights",)),
    "three formats and no more": (
        BrokenBackend({HEAD: broken.KnowsThreeFormats}),
        ("weights-in-an-unknown-format",),
    ),
    "embedding in 16 bits": (
        BrokenBackend({specs.Embedding: broken.EmbeddingIn16Bits}),
        ("embedding",),
    ),
    "head in 16 bits": (BrokenBackend({HEAD: broken.HeadIn16Bits}), ("lm-head",)),
    "norm in 16 bits": (BrokenBackend({NORM: broken.NormIn16Bits}), ("norm",)),
    "an overflow hidden": (
        BrokenBackend({NORM: broken.NormHidesAnOverflow}),
        ("overflows-are-not-hidden",),
    ),
    "delta dropped": (BrokenBackend({NORM: broken.NormDropsDelta}), ("norm", "layer")),
    "last rows sorted": (
        BrokenBackend({specs.LastRows: broken.LogitsRowsSorted}),
        ("last-rows",),
    ),
    "columns beyond 1024": (around(MLP, broken.StopsAt1024Columns), ("real-widths",)),
    "a replay of old positions": (broken.BakesIn("positions"), ("captured-steps",)),
    "a replay of old lengths": (broken.BakesIn("cu_seqlens", "positions"), ("captured-forward",)),
    "a replay of old pages": (broken.BakesIn("pages"), ("captured-steps",)),
    "a replay of old rows": (broken.BakesIn("logits_rows"), ("captured-forward",)),
    "a replay of an old state": (broken.BakesInTheState(), ("captured-steps",)),
    "a replay that cannot be closed": (broken.CannotBeClosed({}), ("captured-forward",)),
    "a given part ignored": (broken.IgnoresTheGivenPart({}), ("built-around-parts",)),
    "unknown spec raises": (broken.RaisesForUnknownSpecs({}), ("unknown-spec-is-refused",)),
    "lossy memory": (broken.LivesInLossyMemory({}), ("memory-round-trip",)),
    "experts of the layer before are streamed": (
        broken.StreamsTheLayerBefore({}),
        ("streamed-experts-are-their-own",),
    ),
    "bits of rounded rows as numbers": (
        broken.ReadsRoundedRows(broken.RowsOf16BitsAsNumbers),
        ("experts-read-rounded-rows",),
    ),
    "only what travels is rounded": (
        broken.ReadsRoundedRows(broken.RoundsOnlyWhatTravels),
        ("experts-read-rounded-rows",),
    ),
    "sums in place": (broken.LivesWhereSumsAreInPlace({}), ("memory-adds",)),
    "less scratch for more rows": (
        broken.ScratchForNoRows({}),
        ("sizes-are-known-before-building",),
    ),
    "less than nothing free": (
        broken.LivesInOverdrawnMemory({}),
        ("sizes-are-known-before-building",),
    ),
    "an answer before the results": (
        CrossingBackend(crossing.AnswersBeforeItHasComputed),
        ("crossings-have-the-blocks-bits", "crossings-can-be-replayed"),
    ),
    "ids of the layer before": (
        CrossingBackend(crossing.AnswersForTheCallBefore),
        ("crossings-have-the-blocks-bits", "crossings-can-be-replayed"),
    ),
    "trips compared by size": (
        CrossingBackend(crossing.AnswersTheFirstTripsOnly, deadline=0.5),
        ("crossings-have-the-blocks-bits",),
    ),
    "a failure that is not taken back": (
        CrossingBackend(crossing.ForgetsToReset),
        ("crossings-fail-by-name",),
    ),
    "failures hidden": (CrossingBackend(crossing.HidesFailures), ("crossings-fail-by-name",)),
    "failures of the first call": (
        CrossingBackend(crossing.NamesTheFirstCall),
        ("crossings-fail-by-name",),
    ),
    "two trips at once": (
        CrossingBackend(made=crossing.SendsBesideAnotherTrip),
        ("crossings-have-the-blocks-bits",),
    ),
    "a wait told behind it": (
        CrossingBackend(made=crossing.TellsBehindTheWait),
        ("crossings-tell-their-waits",),
    ),
    "a wait told ahead of it": (
        CrossingBackend(made=crossing.TellsAheadOfTheWait),
        ("crossings-tell-their-waits",),
    ),
    "waits told for ever": (
        CrossingBackend(made=crossing.TellsWaitsForEver),
        ("crossings-tell-their-waits",),
    ),
    "a wait left out": (device_with(crossing.WaitsForNothing), ("channels-carry-every-trip",)),
    "a worker's share left out": (
        device_with(crossing.WaitsForTheFirstWorker),
        ("channels-carry-every-trip",),
    ),
    "a count of the trip before": (
        device_with(crossing.SendsTheCountBefore),
        ("picked-rows-travel-alone",),
    ),
    "rows put back among those of before": (
        DeviceBackend(crossing.PicksOnABrokenDevice(crossing.PutsBackAmongOthers)),
        ("picked-rows-travel-alone",),
    ),
    "a wait without a deadline": (device_with(crossing.WaitsForEver), ("channels-end-a-wait",)),
    "a deadline that cannot be changed": (
        device_with(crossing.WaitsAsLongAsAtFirst),
        ("channels-wait-as-long-as-they-are-told",),
    ),
    "results of a forward that failed": (
        device_with(crossing.KeepsBytesAfterAFailure),
        ("channels-end-a-wait",),
    ),
    "nobody was late": (device_with(crossing.ForgetsWhoWasLate), ("channels-end-a-wait",)),
    "a trip announced before its arguments": (
        device_with(crossing.AnnouncesBeforeItHasCopied),
        ("channels-carry-every-trip",),
    ),
    "a buffer used again too early": (
        device_with(crossing.ReturnsItsBuffer),
        ("channels-carry-every-trip",),
    ),
    "a sampler that writes its logits": (
        Sampling(samplers.Writes()),
        (
            "sampled-tokens",
            "sampled-tokens-of-large-vocabularies",
            "sampled-tokens-depend-on-their-row-alone",
        ),
    ),
    "a sampler without masks": (Sampling(samplers.Forgets(mask=None)), ("sampled-tokens",)),
    "a sampler that forbids nothing": (
        Sampling(samplers.Forgets(forbidden=())),
        ("sampled-tokens",),
    ),
    "a sampler of one seed": (
        Sampling(samplers.Forgets(seed=0)),
        ("sampled-tokens", "sampled-tokens-of-large-vocabularies"),
    ),
    "a sampler without logprobs": (
        Sampling(samplers.Forgets(logprobs=None)),
        ("sampled-tokens",),
    ),
    "a sampler that forgets the prompt": (
        Sampling(samplers.Forgets(prompt=np.zeros(0, np.int32))),
        ("sampled-tokens",),
    ),
    "a sampler that forgets what it drew": (
        Sampling(samplers.Forgets(generated=np.zeros(0, np.int32))),
        ("sampled-tokens",),
    ),
    "a sampler that counts its rows": (
        Sampling(samplers.CountsItsRows()),
        (
            "sampled-tokens",
            "sampled-tokens-of-large-vocabularies",
            "sampled-tokens-depend-on-their-row-alone",
        ),
    ),
    "a sampler that draws where nothing is asked": (
        Sampling(samplers.DrawsUnasked()),
        ("sampled-tokens",),
    ),
    "a sampler that takes nan for 0": (
        Sampling(samplers.TakesNanForZero()),
        ("sampled-tokens",),
    ),
    "a sampler that forgets what nobody has read": (
        ahead.DrawsAhead(ahead.ForgetsTheNewest),
        ("tokens-drawn-ahead",),
    ),
    "a sampler with errors among its ids": (
        ahead.DrawsAhead(ahead.LeavesErrorsAmongIds),
        ("tokens-drawn-ahead",),
    ),
    "a replay of ids that mean nothing": (ahead.TakesItsOwnIds(), ("steps-begun-ahead",)),
    "weights in fewer bits than the precision says": (RoundedBackend(BF16), ("rounded-weights",)),
    "a replay with old numbers of trips": (
        device_with(crossing.SendsOneNumber),
        ("channels-carry-every-trip",),
    ),
}


# These raise, each where its check looks; whatever else raises is a mistake in the defect itself.
CRASHES = {
    "arguments shared by threads",
    "bias always asked for",
    "empty expert crashes",
    "experts of others are refused",
    "some expert is local",
    "no rows crash",
    "writes its weights",
    "a replay that cannot be closed",
    "pages of 64 tokens only",
    "streams wait for nothing",
    "marks before the last work",
    "copies when asked for",
    "unknown spec raises",
    "trips compared by size",
    "a sampler with errors among its ids",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_named_checks_catch_the_defect(defect: str) -> None:
    backend, names = DEFECTS[defect]
    results = {name: judged(name, backend) for name in names}
    assert {name: r.verdict for name, r in results.items()} == dict.fromkeys(names, "failed")
    raised = [r.detail for r in results.values() if re.match(r"\w+Error: ", r.detail)]
    assert defect in CRASHES or not raised, raised


def test_every_check_catches_something() -> None:
    caught = {name for _, names in [*DEFECTS.values(), *MUTANTS.values()] for name in names}
    of_examples = {"random-calls", "random-programs"}  # see test_examples
    assert sorted(set(CHECKS) - caught - of_examples) == []


def test_the_first_layer_to_differ_is_named() -> None:
    backend, _ = DEFECTS["softmax router"]
    detail = judged("whole-model", backend).detail
    assert "the first block to differ: layers.2.feed_forward.router" in detail
