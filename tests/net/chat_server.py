"""A server with conversations and a scripted engine in a process of its own, to be killed.

    python -m tests.net.chat_server DATA_DIR PORT

It answers every question with the same hundred numbered words, thinking first where it is asked to, one token every
millisecond or so; a prompt that ends in some of them goes on from there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rorqual.data.special import END_THINK, THINK
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.engine.api import EngineInfo
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.serve.app import ServedModel, Settings, create_app
from rorqual.serve.database import database_url
from rorqual.serve.run import serve

THOUGHT = " ".join(f"thought{i}" for i in range(40))
ANSWER = " ".join(f"word{i}" for i in range(100))


def tokenizer() -> Tokenizer:
    return train_tokenizer([THOUGHT, ANSWER, ANSWER], vocab_size=340)


def script(words: Tokenizer) -> Script:
    begin, end = words.special(THINK), words.special(END_THINK)

    def rest(prompt: tuple[int, ...]) -> list[int]:
        said = words.decode(prompt, skip_special=False)
        tail = re.split(r"<｜Assistant｜>", said)[-1]
        answer = tail.rpartition("</think>")[2]
        if begin in prompt and end not in prompt[prompt.index(begin) :]:
            left = THOUGHT.removeprefix(tail.removeprefix("<think>"))
            return [*words.encode(left), end, *words.encode(ANSWER)]
        return words.encode(ANSWER.removeprefix(answer))

    return Script(tokens=rest, delay_s=0.001)


def main() -> None:
    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    words = tokenizer()
    info = EngineInfo("scripted", 1 << 16, words.vocab_size, (words.eos_id,), cache_tokens=1 << 20)
    served = ServedModel(ScriptedEngine([script(words)], info), words, ChatTemplate("v3.1"), name="tiny", created=7)
    app = create_app({"tiny": served}, Settings(database_url=database_url(directory)))
    serve(app, port=port, on_ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
