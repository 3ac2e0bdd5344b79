"""Types of activations: what ranks along ``tensor`` hold of each tensor that the model computes, and of each gradient."""
