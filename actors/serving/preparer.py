"""The preparer: a process that turns requests into prompts, beside the runner whose vocabulary it shares.

    python -m actors.serving.preparer CONTROL_FD

Content from strangers is opened here and nowhere else: the text of requests, JSON schemas, chat templates (which are
programs). The process imports what it needs, is told the file, and reads the vocabulary once. Then it forks a *child*
for every connection that its runner hands over (file descriptors, on the control socket). A child has limits: `CPU_S`
seconds of computing for each question, and `MEMORY_BYTES` of memory beyond the vocabulary's (and what a picture takes
by its size, which is bounded). If it exceeds them, or llama.cpp ends it, one request is lost. The process ends with its
runner, and the children with it. The protocol: `dialogue`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from actors.devices.processes import end_with_parent
from actors.frames import receive, send
from actors.serving.attachments import Attachments
from actors.serving.chat import Chat, ThoughtfulGrammar, render, whole_schema
from actors.serving.dialogue import HELD, SLOT, TOKEN, Kind, Senses, prompt_too_long
from actors.serving.examination import examined
from actors.serving.grammar import Grammar
from actors.serving.infill import infill_prompt
from actors.serving.llama_common import AnswerParser, ChatTemplate, grammar_of
from actors.serving.rerank import rerank_prompt
from actors.serving.vocabulary import Vocabulary
from scheduler.errors import ArrieroError, Rejected
from scheduler.units import MIB, format_bytes

CPU_S = 5.0
"""For each question. A prompt of 456,000 tokens (800 kB) takes 0.6 s, the first token under a schema of 1,000
alternatives and a vocabulary of 150,000 takes 2 s (docs/benchmarks.md)."""

ANSWER_CPU_S = 120.0
"""For all tokens of an answer under a grammar. Without it, one answer could keep a core busy for hours."""

MEMORY_BYTES = 256 * MIB
MEMORY_PER_TOKEN_BYTES = 1024
"""Limits of a child, beyond what it was forked with: a fixed part, and a part per token of the context."""

MOST_BIASES = 4096
"""Tokens that are biased by their text: the sampler looks for each of them at every token."""

LONGEST_MESSAGE = 4000
"""Characters of a refusal. llama.cpp quotes all that it was sent."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_WHAT_IS_READ = ("inputs", "messages", "prompt", "prompts", "infill", "rerank")

_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit statuses of a child that somebody else ended. The request is not to blame, and may be sent again."""


class Nursery:
    """The parent of the children: forks one per connection, and reports there why a child died."""

    def __init__(self, control: socket.socket, vocabulary: Vocabulary, chat_template: str) -> None:
        self._control = control
        self._chat_template = chat_template
        self._vocabulary = vocabulary
        self._poll = select.epoll()
        self._poll.register(control, select.EPOLLIN)
        self._children: dict[int, tuple[int, socket.socket]] = {}  # pid and connection, by pidfd
        self._pidfds: dict[int, int] = {}  # by the connection's descriptor

    def run(self) -> None:
        """Returns in the parent when the runner is gone. A child never returns."""
        while True:
            for ready, _ in self._poll.poll():
                if ready in self._children:
                    self._bury(ready)
                elif ready in self._pidfds:
                    self._end(ready)
                elif ready == self._control.fileno():
                    _, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
                    if not descriptors:
                        return
                    self._fork(socket.socket(fileno=descriptors[0]))

    def _fork(self, connection: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes: the request is not to blame
            connection.close()
            return
        if pid == 0:
            try:
                self._let_go()
                Child(connection, self._vocabulary, self._chat_template).serve()
            finally:
                os._exit(0)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid, connection
        self._pidfds[connection.fileno()] = pidfd
        self._poll.register(pidfd, select.EPOLLIN)
        self._poll.register(connection, 0)  # the child reads it; only its end is looked for

    def _end(self, connection: int) -> None:
        """Kill the child: nobody waits for its result, and it may be inside C for seconds."""
        self._poll.unregister(connection)
        signal.pidfd_send_signal(self._pidfds.pop(connection), signal.SIGKILL)

    def _let_go(self) -> None:
        """In a child: close what belongs to the parent, and end with it."""
        end_with_parent()
        for pidfd, (_, connection) in self._children.items():
            os.close(pidfd)
            connection.close()
        self._poll.close()
        self._control.close()

    def _bury(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        pid, connection = self._children.pop(pidfd)
        if self._pidfds.pop(connection.fileno(), None) is not None:
            self._poll.unregister(connection)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with connection:
            if status and status not in _FROM_OUTSIDE:
                _say(connection, _why(status))


def _say(connection: socket.socket, why: str) -> None:
    with contextlib.suppress(OSError):  # nobody wants to know
        connection.setblocking(False)
        send(connection, Kind.ENDED, why.encode())


def _why(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it took more than {CPU_S:.0f} s of computing, or {ANSWER_CPU_S:.0f} s for the whole answer"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


class Child:
    """One connection's questions, one after the other."""

    def __init__(self, connection: socket.socket, vocabulary: Vocabulary, chat_template: str) -> None:
        self._connection = connection
        self._chat_template = chat_template
        self._vocabulary = vocabulary
        self._held_bytes = _data_bytes()
        self._template: ChatTemplate | None = None
        self._grammar: Grammar | ThoughtfulGrammar | None = None
        self._parser: AnswerParser | None = None
        self._left_s = ANSWER_CPU_S
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def serve(self) -> None:
        """Returns at the end of the stream, or when its memory or its time is used up."""
        while (question := receive(self._connection)) is not None:
            kind, payload = question
            if kind in (Kind.PREPARE, Kind.CONSTRAIN, Kind.SYNTAX):
                self._left_s = ANSWER_CPU_S
            elif self._left_s <= 0:  # many short questions escape the timer
                _say(self._connection, _why(-signal.SIGPROF))
                return
            began_s = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, min(CPU_S, self._left_s))  # its signal ends us, in the middle of C too
            try:
                self._answer(kind, payload)
            except MemoryError:
                _say(self._connection, "it needs more memory than a request may take")
                return
            except ArrieroError as error:
                self._reject(error)
            except Exception as error:  # a request may cause any error; the next one may be fine
                self._reject(Rejected(f"it could not be made into a prompt ({type(error).__name__}: {error})"))
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._left_s -= time.process_time() - began_s

    def _answer(self, kind: int, payload: bytes) -> None:
        match kind:
            case Kind.PREPARE | Kind.CONSTRAIN:
                self._prepare(payload, only_grammar=kind == Kind.CONSTRAIN)
            case Kind.TRY:
                self._try(payload)
            case Kind.SYNTAX:
                self._begin_parsing(payload)
            case _:
                self._parse(kind, payload)

    def _reject(self, error: ArrieroError) -> None:
        told = {"message": error.message[:LONGEST_MESSAGE], "details": error.details}
        send(self._connection, Kind.REJECTED, json.dumps(told, default=str).encode())

    def _step(self, name: str) -> None:
        send(self._connection, Kind.STEP, name.encode())

    def _prepare(self, payload: bytes, *, only_grammar: bool) -> None:
        n_ctx, *senses = SLOT.unpack_from(payload)
        usual_bytes = MEMORY_PER_TOKEN_BYTES * n_ctx + len(payload)
        self._limit_memory(usual_bytes)
        self._forget()
        self._step("the request")
        content: Mapping[str, Any] = json.loads(payload[SLOT.size :])
        attached = Attachments(Senses(*senses))
        chat: Chat | None = None
        if "examine" in content:
            self._step("the text, or the messages")
            told = examined(self._vocabulary, content["examine"], lambda asked: self._chat(asked, attached).prompt)
            send(self._connection, Kind.EXAMINED, HELD.pack(self._grown_bytes()) + json.dumps(told).encode())
            return
        if sum(name in content for name in _WHAT_IS_READ) != 1:
            raise Rejected("a request needs either messages or a prompt, and not both")
        if "messages" in content:
            chat = self._chat(content, attached)
        prompts = [] if only_grammar else self._prompts(content, chat, attached, n_ctx, usual_bytes)
        if chat is not None:
            self._grammar = chat.grammar
        elif "grammar" in content:
            self._step("the grammar")
            self._grammar = Grammar(self._vocabulary, content["grammar"])
        elif "json_schema" in content:
            self._step("the JSON schema")
            self._grammar = Grammar(self._vocabulary, grammar_of(whole_schema(content["json_schema"])))
        for tokens in prompts:
            send(self._connection, Kind.PROMPT, array("i", tokens).tobytes())
        ready = {
            "stops": chat.stops if chat else (),
            "constrained": self._grammar is not None,
            "syntax": chat.syntax if chat else None,
            "preserved": chat.preserved if chat else (),
            "biases": self._biases(content.get("logit_bias", {})),
            "thinking": chat.thinking if chat else None,
            "held_bytes": self._grown_bytes(),
        }
        send(self._connection, Kind.READY, json.dumps(ready).encode())

    def _prompts(
        self, content: Mapping[str, Any], chat: Chat | None, attached: Attachments, n_ctx: int, usual_bytes: int
    ) -> list[list[int]]:
        if several := content.get("inputs") or content.get("prompts"):
            return [self._tokens(each, n_ctx) for each in several]
        if chat is not None and attached.files:
            return [self._shown(chat.prompt, attached, n_ctx, usual_bytes)]
        if chat is not None:
            return [self._tokenized(chat.prompt, n_ctx)]
        if "infill" in content:
            self._step("the text around the gap")
            return [infill_prompt(self._vocabulary, content["infill"], n_ctx)]
        if "rerank" in content:
            return self._pairs(content["rerank"], n_ctx)
        return [self._tokens(content["prompt"], n_ctx)]

    def _pairs(self, wanted: Mapping[str, Any], n_ctx: int) -> list[list[int]]:
        """A reranker's prompts: each document with the query."""
        self._step("the query and the documents")
        pairs = [rerank_prompt(self._vocabulary, wanted["query"], document) for document in wanted["documents"]]
        if (longest := max(map(len, pairs))) > n_ctx:
            raise Rejected(f"a document with the query is {longest} tokens; the slot holds {n_ctx}", n_ctx=n_ctx)
        return pairs

    def _biases(self, by_text: Mapping[str, float]) -> list[tuple[int, float]]:
        """Of each token of each text, as llama-server takes them."""
        biases = [
            (token, bias)
            for text, bias in by_text.items()
            for token in self._vocabulary.tokenize(text, add_special=False)
        ]
        if len(biases) > MOST_BIASES:
            raise Rejected(f"logit_bias: its texts have {len(biases)} tokens; at most {MOST_BIASES} are allowed")
        return biases

    def _limit_memory(self, more_bytes: int) -> None:
        most = self._held_bytes + MEMORY_BYTES + more_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))

    def _forget(self) -> None:
        """Free what belonged to the last answer."""
        for held in (self._grammar, self._parser):
            if held is not None:
                held.close()
        self._grammar = self._parser = None

    def _shown(self, prompt: str, attached: Attachments, n_ctx: int, usual_bytes: int) -> list[int]:
        """Sends the files of a chat, each after the text before it; returns the tokens after the last."""
        from actors.serving import media_files  # most requests have none

        self._limit_memory(usual_bytes + media_files.bytes_to_open(attached.files))
        *texts, last = (self._tokenized(text, n_ctx, begins=False) for text in attached.pieces_of(prompt))
        self._step("the pictures and sounds")
        texts[0] = self._vocabulary.opening + texts[0]
        for tokens, (kind, opened) in zip(texts, media_files.opened(attached), strict=True):
            send(self._connection, Kind.BEFORE, array("i", tokens).tobytes())
            send(self._connection, kind, opened)
        return last

    def _chat(self, content: Mapping[str, Any], attached: Attachments) -> Chat:
        self._step("the model's chat template, the tools or the JSON schema")
        if self._template is None:
            self._template = ChatTemplate(self._vocabulary.model, self._chat_template)
        messages = attached.taken_from(content["messages"])
        return render(self._template, self._vocabulary, {**content, "messages": messages})

    def _tokens(self, prompt: str | Sequence[int], n_ctx: int) -> list[int]:
        if isinstance(prompt, str):
            tokens = self._tokenized(prompt, n_ctx)
        else:
            if len(prompt) > n_ctx:
                raise prompt_too_long(len(prompt), n_ctx)
            tokens = list(prompt)
            if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocabulary.n_tokens:
                wrong = next(token for token in tokens if not 0 <= token < self._vocabulary.n_tokens)
                last = self._vocabulary.n_tokens - 1
                raise Rejected(f"the prompt has token {wrong}; this model's tokens are 0 to {last}")
        if not tokens:
            raise Rejected("the prompt is empty")
        return tokens

    def _tokenized(self, text: str, n_ctx: int, *, begins: bool = True) -> list[int]:
        """At most `n_ctx` tokens of `text`; raises Rejected for more, and at once where so much text cannot be fewer.
        `begins`: with the token that begins every text."""
        self._step("the prompt's text")
        longest_bytes = n_ctx * self._vocabulary.longest_bytes
        if len(text) > longest_bytes:
            raise Rejected(
                f"the prompt is {format_bytes(len(text))} of text; the slot holds {n_ctx} tokens, at most "
                f"{format_bytes(longest_bytes)} of text. Shorten the prompt or load the model with a larger n_ctx",
                n_ctx=n_ctx,
            )
        tokens = self._vocabulary.tokenize(text, add_special=begins)
        if len(tokens) > n_ctx:  # the runner would be busy for half a second with what it then refuses
            raise prompt_too_long(len(tokens), n_ctx)
        return tokens

    def _begin_parsing(self, payload: bytes) -> None:
        self._limit_memory(len(payload))
        self._forget()
        self._parser = AnswerParser(json.loads(payload))
        send(self._connection, Kind.TAKEN, HELD.pack(self._grown_bytes()))

    def _parse(self, kind: int, payload: bytes) -> None:
        assert self._parser is not None
        deltas = self._parser.feed(payload.decode(), is_partial=kind != Kind.ENDS)
        if deltas is None and kind == Kind.ENDS:  # it has not the expected form: take what can be read of it
            deltas = self._parser.feed("", is_partial=True)
        send(self._connection, Kind.DELTAS, HELD.pack(self._grown_bytes()) + json.dumps(deltas or []).encode())

    def _try(self, payload: bytes) -> None:
        assert self._grammar is not None
        (token,) = TOKEN.unpack(payload)
        if self._grammar.take(token):
            send(self._connection, Kind.TAKEN, HELD.pack(self._grown_bytes()))
        else:
            allowed = self._grammar.allowed()
            send(self._connection, Kind.ALLOWED, HELD.pack(self._grown_bytes()) + allowed)

    def _grown_bytes(self) -> int:
        return max(0, _data_bytes() - self._held_bytes)


def _data_bytes() -> int:
    """Bytes of this process that RLIMIT_DATA counts, and its stack."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - read after every token under a grammar
        return int(statm.read().split()[5]) * _PAGE_BYTES


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    if (told := receive(control)) is None:
        return  # its runner ended as a spare
    try:
        path, _, chat_template = told[1].partition(b"\0")
        vocabulary = Vocabulary(os.fsdecode(path))
        _ = vocabulary.longest_bytes  # once, and not in every child
    except ArrieroError as error:
        send(control, Kind.REJECTED, error.message.encode())
        return
    send(control, Kind.READY)
    gc.freeze()  # or every child would copy what the collector looks at
    Nursery(control, vocabulary, chat_template.decode()).run()


if __name__ == "__main__":
    main()
