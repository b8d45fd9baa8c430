"""How does a pickle hold a checkpoint? Pickles are read without being run, and written.

`load` runs opcodes on a `machine` whose `values` are inert, and refuses what is known to run code
(`dangerous`). `torch_objects` finds a checkpoint's tensors in the result, made as `tensors` says.
`write` makes the pickle of an output.
"""
