"""The provider ``ssah`` of inspect_ai: every task of Inspect on an ablated or updated model.

    inspect eval task.py --model ssah/smollm2 -M ablate=scu -M groups=runs/groups

inspect_ai finds it by an entry point of this package. Answers are greedy unless the task or the
command has a temperature above 0, so that the same question has the same answer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

if importlib.util.find_spec("inspect_ai") is None:
    raise ImportError("inspect_ai is not installed: pip install 'ssah[inspect]'")
from anyio import to_thread
from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from transformers import GenerationConfig

from ssah.evaluation.generating import check_room, prompts, room_of, stop_tokens
from ssah.evaluation.harnesses.loading import load_ablated

# What a task may ask for that would change its result, and is not computed here.
_NOT_HERE = (
    "best_of",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "num_choices",
    "presence_penalty",
    "prompt_logprobs",
    "response_schema",
)
_MOST_TOKENS = 2048  # of an answer, where neither the task nor the command says


@modelapi(name="ssah")
class InspectModel(ModelAPI):
    """A local model of which units are switched off.

    Args:
        model_name: the model, as `load_ablated` takes it: what follows ``ssah/``.
        base_url, api_key: nothing; a local model has none.
        config: of inspect_ai.
        update, groups, ablate: as `load_ablated` takes them.
        weights: ``dtype``, ``device`` and ``trust_remote_code`` of `ssah.models.load_model`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (as in inspect_ai; not changed)
        *,
        update: str | None = None,
        groups: str | None = None,
        ablate: str | Sequence[str] = (),
        **weights: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.model, self.tokenizer = load_ablated(
            model_name, update=update, groups=groups, ablate=ablate, **weights
        )
        self._stops = stop_tokens(self.model, self.tokenizer)
        # The model's own settings (penalties, sampling) would change what a task asks for.
        self.model.generation_config = GenerationConfig(
            eos_token_id=self._stops, pad_token_id=self._stops[0] if self._stops else None
        )

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer a chat.

        Raises:
            ValueError: the task has tools, or asks for what this provider does not compute; a
                message has more than text, or the last one is not the user's; the prompt leaves
                the model too few positions for an answer.
        """
        wanted = [name for name in _NOT_HERE if getattr(config, name) is not None]
        if tools or wanted:
            what = f"tools ({tools[0].name}, ...)" if tools else wanted[0]
            raise ValueError(
                f"the task asks for {what}, which the provider ssah does not have: run it on a "
                "server of the exported model, for example by vLLM (docs/export.md)"
            )
        prompt = prompts(self.tokenizer, [{"messages": _turns(input)}], name="input")[0]
        check_room(self.model, [prompt], config.max_tokens or 1, "input")
        # In a thread of its own: inspect_ai runs scorers and its display meanwhile.
        return await to_thread.run_sync(self._answer, prompt, config)

    def _answer(self, prompt: list[int], config: GenerateConfig) -> ModelOutput:
        """The answer to one prompt, as token ids."""
        options: dict[str, Any] = {"do_sample": False}
        if config.temperature:  # all tokens may come, unless the task says how many
            sampled = {"temperature": config.temperature, "top_p": config.top_p or 1.0}
            options = {"do_sample": True, **sampled, "top_k": config.top_k or 0}
        if config.stop_seqs:
            options |= {"stop_strings": config.stop_seqs, "tokenizer": self.tokenizer}
        if config.seed is not None:
            torch.manual_seed(config.seed)
        ids = torch.tensor([prompt], device=self.model.device)  # [1, tokens]
        generate: Any = self.model.generate
        with torch.no_grad():
            made = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=config.max_tokens or self._room(len(prompt)),
                **options,
            )
        answer = made[0, len(prompt) :].tolist()
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        before = min([text.find(stop) for stop in config.stop_seqs or [] if stop in text] or [-1])
        ended = answer[-1] in self._stops or before >= 0
        output = ModelOutput.from_content(
            self.model_name,
            text if before < 0 else text[:before],
            stop_reason="stop" if ended else "max_tokens",
        )
        output.usage = ModelUsage(
            input_tokens=len(prompt),
            output_tokens=len(answer),
            total_tokens=len(prompt) + len(answer),
        )
        return output

    def _room(self, n_prompt: int) -> int:
        """Tokens of an answer where nobody says how many: as many as the model has room for."""
        room = room_of(self.model)
        return _MOST_TOKENS if room is None else min(_MOST_TOKENS, room - n_prompt)

    def max_connections(self) -> int:
        """One question at a time: the model has the device to itself."""
        return 1


def _turns(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """The turns of a chat, as text.

    Raises:
        ValueError: one has more than text, or the last one is not the user's.
    """
    for message in messages:
        parts = [] if isinstance(message.content, str) else message.content
        other = {part.type for part in parts} - {"text", "reasoning"}
        if other:
            raise ValueError(f"a message has {min(other)}, must have text alone for the model ssah")
    if not messages or messages[-1].role != "user":
        role = messages[-1].role if messages else "missing"
        raise ValueError(
            f"the role of the last message is {role}, must be user: the model ssah begins an "
            "answer, and continues none"
        )
    return [{"role": message.role, "content": message.text} for message in messages]
