"""The file format of RED adapters: reading, checking, hashing and writing it."""
