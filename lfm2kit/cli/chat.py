"""`lfm2kit chat`: a conversation in a terminal, or of the lines of stdin."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np

from lfm2kit.building.options import Options
from lfm2kit.cli.console import remark
from lfm2kit.cli.options import OF_RANKS, Without, spread
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.restricting import GIVEN_HERE, Restrictions
from lfm2kit.generating.options import Generation

UNUSED = ("chat", "n", "sequences", "logprobs", "prompt_logprobs")  # options of generated text


@spread
def chat(
    generation: Annotated[Generation, Without((*UNUSED, *GIVEN_HERE))],
    restrictions: Restrictions,
    options: Annotated[Options, Without((*OF_RANKS, "seed"))],
) -> None:
    """Talk with a model: each line is what you say.  Ctrl-C ends an answer, and /exit the chat."""
    # Here, because all commands import this module, and none but this needs all of that.
    from lfm2kit.cli.preparing_text import prepare, writer_of
    from lfm2kit.cli.talking import HELP, Talk
    from lfm2kit.generating.conversation import Conversation

    refuse_copies()
    generation = restrictions.added_to(replace(generation, chat=True))
    prepared = prepare(options, generation, None, restrictions.reads())
    prepared.language.check_chat(prepared.generation)  # before a weight is read
    writer = writer_of(prepared, generation.context, 1)
    remark(f"{HELP}; seed {prepared.seed}")
    with np.errstate(all="ignore"):  # what is not finite ends the answer
        Talk(writer, Conversation(writer, prepared.generation, prepared.seed)).run()
