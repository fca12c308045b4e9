"""The engines that compare.py lets compete, each behind the same questions.

Every method prepares what is not to be timed (tensors of ids, an empty cache, the prompt) and
returns a call that does the work alone: token ids in, logits of each sample's last token out, on
the host.  Settings are each engine's best known ones for this work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Call = Callable[[], Any]
SEQ_LEN = 16
BLOCK_SAMPLES = (1, 16, 64)
BLOCK_SEED = 0


class Lfm2kit:
    """This project's cpu_simd, with weights in the checkpoint's type."""

    def __init__(self, folder: Path, threads: int) -> None:
        from lfm2kit.building.loading import set_up
        from lfm2kit.building.options import Options
        from lfm2kit.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(folder)
        self._setup = set_up(checkpoint, Options(backend="cpu_simd", threads=threads))
        self._model = self._setup.build()
        self._blocks: dict[tuple[str, int], Call] = {}

    def forward(self, ids: Ids) -> Call:
        from lfm2kit.batch import Batch

        return lambda: self._model.logits(Batch.of_sequences(list(ids)))

    def decode(self, prompts: Ids, ids: Ids) -> Call:
        """Return a call that decodes `ids` [samples, steps] after `prompts` [samples, tokens]."""
        from lfm2kit.batch import Batch
        from lfm2kit.state import Room

        n, tokens = prompts.shape
        room = Room.of_sequences(n, tokens + ids.shape[1])
        state = self._model.new_state(room)
        pages = np.arange(room.pages, dtype=np.int32).reshape(n, -1)
        self._model.logits(Batch.of_sequences(list(prompts), pages=pages), state)

        def steps() -> Any:
            for step in range(ids.shape[1]):
                next_ids, starts = list(ids[:, step : step + 1]), [tokens + step] * n
                batch = Batch.of_sequences(next_ids, starts=starts, pages=pages)
                logits = self._model.logits(batch, state)
            return logits

        return steps

    def block(self, kind: str, samples: int) -> Call:
        from lfm2kit.measuring.single_blocks import single_blocks

        if (kind, samples) not in self._blocks:
            for timed in single_blocks(self._setup, kind, BLOCK_SAMPLES, [SEQ_LEN], BLOCK_SEED):
                self._blocks[kind, timed.samples] = timed.call
        return self._blocks[kind, samples]

    def ceilings(self) -> Call:
        from lfm2kit.measuring.bench import measured_ceilings

        return lambda: measured_ceilings(self._setup)


class Transformers:
    """transformers on torch in float32, with sdpa attention."""

    def __init__(self, folder: Path, threads: int, experts: str) -> None:
        import torch
        from transformers import Lfm2MoeForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = Lfm2MoeForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            experts_implementation=experts,
        ).eval()

    def forward(self, ids: Ids) -> Call:
        input_ids = _long(ids)
        return lambda: self._logits(input_ids, use_cache=False)

    def decode(self, prompts: Ids, ids: Ids) -> Call:
        seen = self._model(input_ids=_long(prompts), use_cache=True).past_key_values
        chunks = [_long(ids[:, i : i + 1]) for i in range(ids.shape[1])]

        def steps() -> Any:
            for chunk in chunks:
                logits = self._logits(chunk, past_key_values=seen, use_cache=True)
            return logits

        return steps

    def _logits(self, input_ids: Any, **kwargs: Any) -> Any:
        return self._model(input_ids=input_ids, logits_to_keep=1, **kwargs).logits[:, 0].numpy()

    def block(self, kind: str, samples: int) -> Call:
        import torch

        x = torch.from_numpy(_block_input(samples, self._model.config.hidden_size))
        role = {"conv": "conv", "attn": "self_attn", "moe": "feed_forward"}[kind]
        module = next(m for m in self._modules(role) if kind != "moe" or hasattr(m, "experts"))
        if kind != "attn":
            return lambda: module(x).reshape(-1, x.shape[-1]).numpy()
        angles = self._model.model.pos_emb(x, torch.arange(SEQ_LEN)[None])
        return lambda: module(x, angles, None)[0].reshape(-1, x.shape[-1]).numpy()

    def _modules(self, role: str) -> list[Any]:
        layers = self._model.model.layers
        return [getattr(layer, role) for layer in layers if hasattr(layer, role)]


def _long(ids: Ids) -> Any:
    import torch

    return torch.from_numpy(ids.astype(np.int64))


def _block_input(samples: int, hidden_size: int) -> npt.NDArray[np.float32]:
    """Return the activations that `lfm2kit.measuring.single_blocks` draws."""
    rng = np.random.default_rng(BLOCK_SEED)
    for n in BLOCK_SAMPLES[: BLOCK_SAMPLES.index(samples) + 1]:
        x = rng.standard_normal((n * SEQ_LEN, hidden_size), dtype=np.float32)
    return x.reshape(samples, SEQ_LEN, hidden_size)


class LlamaCpp:
    """llama.cpp on a GGUF file, all in one micro-batch; keys and values in float32.

    One cache for all sequences, or a context for one sequence alone, made no difference.
    """

    SEQUENCES = 64
    TOKENS = SEQUENCES * SEQ_LEN
    ROOM = 256  # tokens of context a sequence, what llama.cpp rounds up to anyway
    ERROR = 4  # ggml's log level

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(self._say)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"llama.cpp cannot load {path}"
        self._context = llama_cpp.llama_init_from_model(model, self._parameters(threads))
        assert self._context, "llama.cpp cannot make a context"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(self.TOKENS, 0, 1)

    def _parameters(self, threads: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.SEQUENCES * self.ROOM
        params.n_batch = params.n_ubatch = self.TOKENS
        params.n_seq_max = self.SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        return params

    def _say(self, level: int, text: bytes, _: Any) -> None:
        if level == self.ERROR:
            print(text.decode(errors="replace"), end="", flush=True)

    def forward(self, ids: Ids) -> Call:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._fill(ids, 0)
        return lambda: self._decoded(len(ids))

    def decode(self, prompts: Ids, ids: Ids) -> Call:
        self.forward(prompts)()

        def steps() -> Any:
            for step in range(ids.shape[1]):
                self._fill(ids[:, step : step + 1], prompts.shape[1] + step)
                logits = self._decoded(len(ids))
            return logits

        return steps

    def _fill(self, ids: Ids, start: int) -> None:
        """Fill the batch with `ids` [samples, tokens] at positions from `start` on."""
        batch = self._batch
        samples, tokens = ids.shape
        batch.n_tokens = ids.size
        for row, (sample, token) in enumerate(np.ndindex(samples, tokens)):
            batch.token[row] = int(ids[sample, token])
            batch.pos[row] = start + token
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sample
            batch.logits[row] = token == tokens - 1

    def _decoded(self, samples: int) -> Any:
        status = self._lib.llama_decode(self._context, self._batch)
        assert status == 0, f"llama_decode returned {status}"
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (samples, self._vocab_size))


ENGINES: dict[str, Sequence[Any]] = {
    "lfm2kit": (Lfm2kit,),
    "transformers eager": (Transformers, "eager"),
    "transformers grouped_mm": (Transformers, "grouped_mm"),
    "llama.cpp": (LlamaCpp,),
}
