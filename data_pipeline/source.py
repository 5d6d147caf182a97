"""What an input was when it was read, as the marker of its folder keeps it, and what has changed since."""

from data_pipeline.readers import InputShard


def source_entry(shard: InputShard, image_root: str | None) -> dict:
    """The part of a marker that says what its folder was made from."""
    read = {"bytes": shard.size, "mark": shard.mark, "image_root": image_root}
    return {"folder": shard.name, "source": shard.url, "read": read}


def change(marker: dict, shard: InputShard, image_root: str | None) -> str:
    """What is not as it was when the marker's folder was made; empty where nothing is.

    Markers of earlier versions don't say how it was, and a mark that can't be compared says nothing.
    """
    read = marker.get("read")
    if read is None:
        return ""
    if read["bytes"] != shard.size:
        return f"it had {read['bytes']} bytes and has {shard.size}"
    marks = read["mark"], shard.mark
    if None not in marks and len({mark.split()[0] for mark in marks}) == 1 and len({*marks}) == 2:
        return "its content is another"
    if read["image_root"] != image_root:
        return f"read.image_root was {read['image_root'] or 'null'} and is {image_root or 'null'}"
    return ""
