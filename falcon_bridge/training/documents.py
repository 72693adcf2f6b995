"""Documents of a pretraining row apart from each other: no attention across them, a fresh SSM state in each."""

from typing import Any

from falcon_bridge.errors import UserError


def separate_documents(cfg: Any, on: bool = True) -> None:
    """Keep the documents of each pretraining row apart, or (the older way) let each row be one stream of text.

    This is Megatron Core's ``dataset.inter_document_masking``: the borders come from the index of the dataset, and
    positions restart in each document. `forward_step.forward_step` hands the borders to the model. Falcon-H1 was
    pretrained so (arXiv 2507.22448).

    Args:
        cfg: a ``ConfigContainer`` with a ``GPTDatasetConfig``; changed in place.
        on: whether to.
    """
    cfg.dataset.inter_document_masking = on
    sync_documents(cfg)


def sync_documents(cfg: Any) -> None:
    """Set what follows from ``dataset.inter_document_masking``, which an override may have changed.

    Args:
        cfg: a ``ConfigContainer``; changed in place.
    """
    if not cfg.dataset.inter_document_masking:
        return
    # a [s, s] mask a row that nothing would read
    cfg.dataset.create_attention_mask = False
    # Megatron Bridge gives the batch to the middle stages of a pipeline only with this; they need the borders
    cfg.dataset.skip_getting_attention_mask_from_dataset = cfg.model.pipeline_model_parallel_size <= 2


def check_documents(cfg: Any) -> None:
    """Refuse layouts in which documents cannot be kept apart.

    Args:
        cfg: a ``ConfigContainer`` with a ``GPTDatasetConfig``.

    Raises:
        UserError: under context parallelism by other than heads, or for a pipeline with several rows at a time.
    """
    from falcon_bridge.models.falcon_h1.head_parallel import HEADS
    from falcon_bridge.models.falcon_h1.provider import FalconH1ModelProvider

    sync_documents(cfg)
    if not cfg.dataset.inter_document_masking:
        return
    off = "or dataset.inter_document_masking=false to let each row be one stream of text"
    splits_heads = isinstance(cfg.model, FalconH1ModelProvider) and cfg.model.cp_comm_type == HEADS
    if (cfg.model.context_parallel_size or 1) > 1 and not splits_heads:
        raise UserError(
            "documents are kept apart under context parallelism where attention splits its heads, and otherwise each "
            "would be cut into 2·CP equal parts: set model.cp_comm_type=a2a, or model.context_parallel_size=1, "
            f"{off}"
        )
    rows = max(cfg.train.micro_batch_size, cfg.validation.eval_micro_batch_size or 1)
    if cfg.model.pipeline_model_parallel_size > 1 and rows > 1:
        # the rows of a micro batch become one long row, while pipeline stages expect [s, b, h]
        raise UserError(
            f"documents are kept apart in a pipeline one row at a time, and train.micro_batch_size={rows}: set it to "
            f"1, {off}"
        )
