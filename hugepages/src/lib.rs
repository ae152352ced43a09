//! Survey and reservation of huge pages.
