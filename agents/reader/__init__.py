"""The reader: a small transformer that says which steps a message asks for, in what order, and by which words.

`source` reads the pretrained model's file, `pieces` splits text, `encoding` chooses what of a conversation is read,
`graph` runs the layers, `reader` answers; `net` and `train` make its weights and are not needed at run time.
"""
