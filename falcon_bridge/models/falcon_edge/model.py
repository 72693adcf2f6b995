"""The container: mcore's GPTModel with a masked vocabulary padding."""

from megatron.core.models.gpt import GPTModel

from falcon_bridge.models.falcon_h1.model import FalconH1Model


class FalconEdgeModel(GPTModel):
    """GPTModel whose config is a `FalconEdgeModelProvider`.

    The columns that pad the vocabulary get the lowest finite logit, so that loss and sampling see only real tokens.
    """

    _scale_logits = FalconH1Model._scale_logits
    _padded_columns = FalconH1Model._padded_columns
