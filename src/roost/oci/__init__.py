"""Images as the OCI specifications have them: references, registries, layers. Knows no engine and no workspace."""
