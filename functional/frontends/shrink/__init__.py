"""The parts of ``shrink_config``: the layers that are kept, the sizes that take the place of large ones, and their trial."""
