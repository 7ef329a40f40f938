"""`mlx_lm.server`'s own classes with a `PromptCache`: the only importer of that module.

What is added: where prompts are cut (tool turns, checkpoints at branches), what an answer says
about the cache, and which files a model was loaded from. `seam` lists what is used of upstream's
private parts. What does not need upstream's classes lies beside this package.
"""
