from falcon_bridge.ops.ssd.chunked import ssd_chunked
from falcon_bridge.ops.ssd.naive import ssd_recurrent


__all__ = ["ssd_chunked", "ssd_recurrent"]
