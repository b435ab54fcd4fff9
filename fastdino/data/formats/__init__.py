"""The containers that can be read, one file each: what an image's bytes are, found without reading them."""
