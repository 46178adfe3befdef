"""The provider ``ssah`` of inspect_ai: every task of Inspect on an ablated or updated model.

    inspect eval task.py --model ssah/smollm2 -M ablate=scu -M groups=runs/groups

inspect_ai finds it by an entry point of this package. Answers are greedy unless the task or the
command has a temperature above 0, so that the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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

from ssah.evaluation.generating import prompts, stop_tokens
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

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer a chat.

        Raises:
            ValueError: the task has tools, or asks for what this provider does not compute.
        """
        wanted = [name for name in _NOT_HERE if getattr(config, name) is not None]
        if tools or wanted:
            what = f"tools ({tools[0].name}, ...)" if tools else wanted[0]
            raise ValueError(
                f"the task asks for {what}, which the provider ssah does not have: run it on a "
                "server of the exported model, for example by vLLM (docs/export.md)"
            )
        turns = [{"role": message.role, "content": message.text} for message in input]
        prompt = prompts(self.tokenizer, [{"messages": turns}], name="input")[0]
        # In a thread of its own: inspect_ai runs scorers and its display meanwhile.
        return await to_thread.run_sync(self._answer, prompt, config)

    def _answer(self, prompt: list[int], config: GenerateConfig) -> ModelOutput:
        """The answer to one prompt, as token ids."""
        options: dict[str, Any] = {"do_sample": bool(config.temperature)}
        # None where it is not sampled: generation settings of the model would be warned of.
        for name in ("temperature", "top_p", "top_k"):
            options[name] = getattr(config, name) if config.temperature else None
        if config.stop_seqs:
            options |= {"stop_strings": config.stop_seqs, "tokenizer": self.tokenizer}
        if config.seed is not None:
            torch.manual_seed(config.seed)
        ids = torch.tensor([prompt], device=self.model.device)  # [1, tokens]
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=config.max_tokens or _MOST_TOKENS,
                eos_token_id=self._stops,
                pad_token_id=self._stops[0] if self._stops else None,
                **options,
            )
        answer = made[0, len(prompt) :].tolist()
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
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

    def max_connections(self) -> int:
        """One question at a time: the model has the device to itself."""
        return 1
