"""The artifact: typed structs of manifest and plan, and their reading, writing, hashing and checking."""
