"""Turn image-text corpora into dual-codebook shards, with Ray.

`python data_pipeline/tokenize.py --config data_pipeline/configs/demo.yaml inputs=[GLOB,...] output=DIR`
"""

import os
import sys

if __name__ == "tokenize":
    # This file's name is the standard library's: in a folder that is on the path (its own when run as a script, a
    # Ray head's home) it is what `import tokenize` finds. So it becomes the module that was asked for.
    _stdlib = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    with open(_stdlib, "rb") as _source:
        exec(compile(_source.read(), _stdlib, "exec"))
else:
    _here = os.path.dirname(os.path.realpath(__file__))
    _root = os.path.dirname(_here)
    sys.path[:] = [place for place in sys.path if os.path.realpath(place or os.getcwd()) != _here]
    if os.path.isdir(os.path.join(_root, "megadual")):  # a checkout goes before an installed package
        sys.path.insert(0, _root)

    from data_pipeline.run import main

    if __name__ == "__main__":
        main()
