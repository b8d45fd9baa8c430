"""How does a pickle hold a checkpoint? Pickles are read without being run, and written.

`load` runs the opcodes of a pickle (`opcodes`) on a machine (`machine`) whose values are inert
(`values`), refuses what is known to run code (`dangerous`), and pays for each object (`allowance`).
`torch_objects` makes a checkpoint of the result: `tensors` knows how torch rebuilds tensors, and
`tree` finds them. `write` makes the pickle of an output.
"""
