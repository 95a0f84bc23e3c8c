"""Other ways to draw p(x | c) p(y | x)^gamma from the same base, each a short file around one function

    sample(base, likelihood, label, prompts, generator, *, weight, …) -> images (n, C, H, W) in [0, 1] for n prompt rows

`base` is the opened pipeline (base.py), `likelihood` the same calibrated classifier for all methods, `weight` the method's one tuned number. What
must be trained first is trained by the file's `fit`, which returns what its `sample` takes in place of the base.
"""
