"""How ``verify`` judges a layout: all ranks as threads of one process, in double precision, beside the whole model."""
