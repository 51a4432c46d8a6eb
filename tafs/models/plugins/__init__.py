"""The shipped model plug-ins: one file per architecture that can be trained."""
