//! Sessions, negotiation, the tensor store and the genie binary.
