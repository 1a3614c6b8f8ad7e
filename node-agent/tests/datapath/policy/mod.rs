//! Policy: what each endpoint may do, decided in the kernel.

mod maps;
