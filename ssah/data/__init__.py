"""Rows, encoding and batches: from a data set to what `ssah.attribute` and a trainer take.

rows = load_rows("builtin:safety")                  # prompt and completion, checked
loader = make_loader(rows, tokenizer)               # input_ids, attention_mask, labels
trainer = Trainer(..., train_dataset=list(encode(rows, tokenizer)),
                  data_collator=Collator(tokenizer))
"""

from __future__ import annotations

from ssah.data.asking import (
    SALAD_SETS,
    Asked,
    Lettered,
    draw_by_category,
    drop_category,
    drop_seen,
    load_asked,
    load_lettered,
    load_salad,
    policy_pairs,
)
from ssah.data.counts import Counts, warn_of_shared
from ssah.data.encoding import IGNORE_INDEX, Encoded, Encoder, encode
from ssah.data.fields import DataError, Row, check_count, kind_of, turns_of
from ssah.data.loader import Collator, Loader, fingerprint, make_loader
from ssah.data.preferences import (
    Pair,
    answered,
    check_preferences,
    load_preferences,
    request_of,
)
from ssah.data.requests import load_requests
from ssah.data.row_options import Reading, rows_read, template_options
from ssah.data.row_order import in_turns, mixed, schedule, spread
from ssah.data.rows import BUILTIN, RowStream, load_rows
from ssah.data.templates import template_record, use_template
from ssah.data.unbatching import encoded_rows
from ssah.lazy import submodules_of

__all__ = [
    "BUILTIN",
    "IGNORE_INDEX",
    "SALAD_SETS",
    "Asked",
    "Collator",
    "Counts",
    "DataError",
    "Encoded",
    "Lettered",
    "Loader",
    "Pair",
    "Row",
    "RowStream",
    "answered",
    "check_preferences",
    "draw_by_category",
    "drop_category",
    "drop_seen",
    "encode",
    "encoded_rows",
    "fingerprint",
    "load_asked",
    "load_lettered",
    "load_preferences",
    "load_requests",
    "load_rows",
    "load_salad",
    "make_loader",
    "policy_pairs",
    "request_of",
    "template_record",
    "use_template",
    "warn_of_shared",
]

__getattr__ = submodules_of(__name__)
