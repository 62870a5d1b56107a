"""An engine as a model of lm-evaluation-harness, for its tasks: `pip install 'inlay[eval]'`.

>>> import lm_eval
>>> with LLM("llama-engine") as llm:
...     lm_eval.simple_evaluate(model=InlayLM(llm), tasks=["hellaswag"])

Contexts and continuations become tokens, and are cut, as in the harness's own model for Hugging
Face (`lm_eval.models.huggingface.HFLM`), so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from inlay.embedding import SCORE_PARAMS
from inlay.errors import OptionError
from inlay.llm import LLM
from inlay.runtime.sampling_params import SamplingParams

MAX_GEN_TOKENS = 256
"""Where a task does not say; the harness's own default."""

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens to generate, the first one given counts."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Arguments of a task's generation that are ours too."""

IGNORED = ("do_sample", "until", *TOKEN_LIMITS)


class InlayLM(TemplateLM):
    """The harness's requests, answered by an `LLM`. All of a call run in flight together."""

    def __init__(self, llm: LLM, max_seq_len: int, *, show_progress: bool = True) -> None:
        """max_seq_len: the engine's; prompt and output together.

        Raises OptionError where the engine has no tokenizer.
        """
        super().__init__()
        self._llm, self._show = llm, show_progress
        tokenizer = llm.get_tokenizer()
        if tokenizer is None:
            raise OptionError("tasks need a tokenizer, and the engine has none: give tokenizer=")
        self.tokenizer = tokenizer
        # A score's prompt holds what the harness feeds, the last token judged, and room for one.
        self.max_length = max_seq_len - 2

    @property
    def tokenizer_name(self) -> str:
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            options["add_special_tokens"] = False
        ids: list[int] = self.tokenizer.encode(string, verbose=False, **options)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(context and continuation as text, or None; both as tokens): the continuation's log
        probability, and whether each of its tokens is the likeliest."""
        rows = [[*before, *after][-(self.max_length + 1) :] for _, before, after in requests]
        prompts = [{"prompt_token_ids": row} for row in rows]
        show = self._show and not disable_tqdm
        outputs = self._llm.generate(prompts, SCORE_PARAMS, use_tqdm=show)
        answers = []
        for (texts, _, after), row, output in zip(requests, rows, outputs, strict=True):
            if output.error is not None:
                raise output.error
            found = (output.prompt_logprobs or [])[len(row) - len(after) :]
            # None is the first token's, and no continuation begins there.
            places = [(one or {})[token] for one, token in zip(found, after, strict=True)]
            answer = sum(p.logprob for p in places), all(p.rank == 1 for p in places)
            answers.append(answer)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, of any length: in windows that judge each token once."""
        windows, counts = [], []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += pieces
            counts.append(len(pieces))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy, unless a task asks for sampling; cut before the first stop string."""
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            chosen = self._sampling(options)
            room = self.max_length - (chosen.max_tokens or MAX_GEN_TOKENS)
            if room < 1:
                raise OptionError(
                    f"a task wants {chosen.max_tokens} tokens, which leaves no room for a prompt "
                    f"in max_seq_len, {self.max_length + 2}; build the engine with a longer one"
                )
            prompts.append({"prompt_token_ids": self.tok_encode(context)[-room:]})
            params.append(chosen)
        outputs = self._llm.generate(prompts, params, use_tqdm=self._show and not disable_tqdm)
        texts = []
        for request, output in zip(requests, outputs, strict=True):
            if output.error is not None:
                raise output.error
            texts.append(output.outputs[0].text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _sampling(self, options: dict[str, Any]) -> SamplingParams:
        """A task's generation_kwargs in our words; OptionError for one that has none."""
        if unknown := sorted(set(options) - {*SAMPLING, *IGNORED}):
            raise OptionError(
                f"a task's generation_kwargs has {unknown[0]!r}; allowed are "
                f"{', '.join((*SAMPLING, *IGNORED))}"
            )
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        most = next((options[n] for n in TOKEN_LIMITS if options.get(n) is not None), None)
        given = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", given.get("temperature", 0) > 0):
            for name in ("top_p", "top_k", "min_p"):
                given.pop(name, None)
            given["temperature"] = 0.0
        max_tokens = MAX_GEN_TOKENS if most is None else int(most)
        return SamplingParams(**{"temperature": 1.0, **given}, stop=stop, max_tokens=max_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
