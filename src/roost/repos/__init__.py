"""Git repositories: what people may name, one runner for the git binary, clones, bundles, the ssh-agent relay."""
