"""Attention maps: by word, token or patch, over steps, sites and grids, averaged over heads.

Maps are read out of the finished terms (edits included); probabilities are never kept. A map is a
share of attention: at a cross-attention site the values of all text tokens at one place sum to 1,
and so do those of all places that a patch looks at (unless an edit rescaled them).

`Maps` reads them while a pipeline draws, `MapStore` keeps them, `WordMaps` answers. `MapSums`, of
which the means are made, serve recipes that make masks of maps as well.
"""

from hookctl.maps.editor import Maps
from hookctl.maps.records import MapKey, MapRecord, WordMaps
from hookctl.maps.store import MapStore, MapSums, map_of

__all__ = ["MapKey", "MapRecord", "MapStore", "MapSums", "Maps", "WordMaps", "map_of"]
