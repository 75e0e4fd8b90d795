"""The clipping methods: one file each, named like its YAML file and its test."""
