"""Pictures, messages and bundles that an attacker or a broken camera would send."""
