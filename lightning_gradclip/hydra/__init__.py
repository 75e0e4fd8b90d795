"""Makes the configuration pack known to Hydra. Nothing here imports torch or Lightning.

Doors: `search_path` and `namespace_plugin` for Hydra, `finder` for the package, `none` for the option of its name,
`structured` for typed configurations.
"""
