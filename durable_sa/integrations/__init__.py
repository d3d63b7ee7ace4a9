"""Parts for applications of other frameworks, each in a module of its own, which imports the framework if need be."""
