"""The formats of an export: how ternary weights are written, in which dtypes, and what config.json says of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from falcon_bridge.conversion.bitnet_checkpoint import CODES_PER_BYTE, packed_shapes
from falcon_bridge.conversion.bitnet_config import LATENT_ENTRY, PACKED_ENTRY, is_scale, is_ternary_weight
from falcon_bridge.conversion.hf_config import FALCON_H1
from falcon_bridge.errors import UserError


if TYPE_CHECKING:
    import torch

FORMATS = ("hf", "bitnet", "prequantized", "bf16")
SCALE_TOLERANCE = 2**-22
"""Two units in the last place of fp32: how far a packed scale may move on its way through latent weights."""

_HF_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def check_format(name: str) -> None:
    """Refuse a format that there is not.

    Raises:
        UserError: with those that there are.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name} is unknown: use one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class ExportFormat:
    """One export's.

    Attributes:
        name: One of `FORMATS`. "hf" is the form of the checkpoint that was imported, in its dtypes.
        architecture: In config.json.
        ternary: Whether the model was trained with BitNet linears.
        dtype: Of the Megatron model, ``"F32"`` or ``"BF16"``.
        source_form: Of the imported checkpoint (`models.falcon_edge.weights.Form`); None where there is none.
        source_dtypes: Of the imported checkpoint's tensors by name; empty likewise.
    """

    name: str
    architecture: str
    ternary: bool
    dtype: str
    source_form: str | None = None
    source_dtypes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_format(self.name)
        if self.name != "hf" and not self.ternary:
            raise UserError(
                f"--format {self.name} is for ternary models, and this one was trained with use_bitnet=False: use hf"
            )

    @property
    def form(self) -> str:
        """The `models.falcon_edge.weights.Form` to write."""
        if self.name != "hf":
            return self.name
        return self.source_form if self.ternary and self.source_form else "prequantized"

    def shapes(self, dense: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what will be written.

        Args:
            dense: those of transformers' model.

        Raises:
            UserError: a matrix cannot be packed.
        """
        if self.form != "bitnet":
            return dict(dense)
        for name, shape in dense.items():
            if is_ternary_weight(name) and shape[0] % CODES_PER_BYTE:
                raise UserError(
                    f"{name} has {shape[0]} out features, which are not a multiple of {CODES_PER_BYTE}, so the packed "
                    "bitnet format cannot hold it: use --format prequantized or bf16"
                )
        return packed_shapes(dense)

    def config(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        """config.json for what is written, from that of the source; None leaves it as it is.

        The marks tell transformers, and an import, how to read the weights; Bridge would drop them.
        """
        if self.name == "hf":
            return None
        dtype = "bfloat16" if self.form == "bf16" else _HF_DTYPES[self.dtype]
        fields = {name: value for name, value in fields.items() if name not in ("quantization_config", "torch_dtype")}
        fields["dtype"] = dtype
        entry = {"bitnet": PACKED_ENTRY, "prequantized": LATENT_ENTRY}.get(self.form)
        if entry is not None:
            fields["quantization_config"] = dict(entry)
        if entry is not None or self.architecture != FALCON_H1:
            fields["is_bitnet_config"] = True
        return fields

    def convert(self, tensors: Iterable[tuple[str, "torch.Tensor"]]) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Give a stream of Hugging Face tensors, ternary ones latent, the form and dtypes of this format.

        Raises:
            ValueError: With one line: a matrix has NaN or infinite weights.
        """
        from falcon_bridge.models.falcon_edge.weights import Form, from_latent

        for name, tensor in from_latent(Form(self.form), tensors) if self.ternary else tensors:
            yield name, self._cast(name, tensor)

    def _cast(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        import torch

        from falcon_bridge.conversion.runtime import DTYPES

        if tensor.dtype == torch.uint8:
            return tensor
        if self.name != "hf":
            wanted = "F32" if is_scale(name) else "BF16" if self.form == "bf16" else self.dtype
            return tensor.to(DTYPES[wanted])
        wanted = self.source_dtypes.get(name)
        if is_scale(name):
            # a trained scale needs its fp32; one that is as it was imported fits the dtype that it had
            narrow = tensor.to(DTYPES[wanted or "F32"])
            return narrow if (narrow.float() - tensor).abs() <= SCALE_TOLERANCE * tensor else tensor
        cast = tensor.to(DTYPES[wanted or self.dtype])
        if self.ternary and self.form == "prequantized" and is_ternary_weight(name):
            # rounding latent weights that were trained in a wider dtype than they came in would change codes
            return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor
        return cast
