"""A running sequence (or several in step): its slots of GDN state, its KV cache, its position."""

import torch
from torch import Tensor

from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.errors import OptionError
from gated_delta.model.config import HybridConfig
from gated_delta.state import LayerState, StatePool


class Session:
    """State of ``rows`` sequences of equal length.

    With ``drafts`` every step after the first is speculative: the state after each of its tokens is kept until
    :meth:`keep` says how many of them count.

    Raises (in :meth:`begin`):
        OptionError: the context would outgrow the positions that the model was trained for.
    """

    def __init__(
        self, config: HybridConfig, *, rows: int = 1, drafts: int = 0, state_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.config, self.drafts, self.device = config, drafts, torch.device(device)
        attention = [config.is_attention(i) for i in range(config.layers)]
        self._pool = StatePool(
            config.delta_net, layers=attention.count(False), slots=rows * (drafts + 1), num_spec=drafts,
            state_dtype=state_dtype, device=device,
        )  # fmt: skip
        self._slots = [self._pool.allocate(drafts + 1) for _ in range(rows)]
        kv_shape = (2, rows, config.max_positions, config.attention_heads, config.hidden_size // config.attention_heads)
        self.states: list[LayerState | Tensor] = [
            torch.zeros(kv_shape, device=device) if here else self._pool.layer(attention[:i].count(False))
            for i, here in enumerate(attention)
        ]
        """What each layer of the model keeps: GDN state, or a cache of keys and values."""
        self.length = 0
        self._accepted = 1
        self._stepped = 0

    def begin(self, tokens: int) -> GatedDeltaNetBatch:
        """Describe a step of ``tokens`` tokens a row; :meth:`keep` ends it."""
        if self.length + tokens > self.config.max_positions:
            was, most = f"{self.length + tokens} tokens long", self.config.max_positions
            raise OptionError("Session", "the context", was, f"at most {most}, the model's positions")
        rows: list[Row | SpecRow] = [Row(tokens, slots[0], fresh=self.length == 0) for slots in self._slots]
        if self.drafts and self.length:
            rows = [SpecRow(tokens, slots, self._accepted) for slots in self._slots]
        self._stepped = tokens
        return GatedDeltaNetBatch.build(rows, num_spec=self.drafts, device=self.device)

    def keep(self, tokens: int) -> None:
        """End a step: its first ``tokens`` tokens count, the rest is rolled back.

        Raises:
            OptionError: more than the step had, none, or fewer where the session is not speculative.
        """
        least = 1 if self.drafts and self.length else max(1, self._stepped)
        if not least <= tokens <= self._stepped:
            raise OptionError("Session.keep", "tokens", tokens, f"in [{least}, {self._stepped}]")
        self._accepted = tokens if self.drafts and self.length else 1
        self.length += tokens
        self._stepped = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of GDN state that one sequence holds, whatever its length: a slot, and one more for each draft."""
        return self._pool.bytes_per_slot * (self.drafts + 1)

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of KV cache of a sequence now: of the attention layers, and what the GDN layers would add as such."""
        caches = [state[:, 0, : self.length] for state in self.states if isinstance(state, Tensor)]
        return caches[0].nbytes * len(caches), caches[0].nbytes * (self.config.layers - len(caches))
