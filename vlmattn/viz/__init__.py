"""Pictures of what methods do."""
