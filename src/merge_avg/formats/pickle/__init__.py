"""How does a pickle hold a checkpoint? Pickles are read without being run, and written.

`load` runs opcodes on a `machine` whose `values` are inert, and refuses what is known to run code.
`tensors` makes a checkpoint's tensors of some values, or the pickle of an output; `torch_objects`
finds them in the result.
"""
