//! Puts a tensor from shared memory and gets it back.
//!
//! usage: put_get SOCKET [NODE]

use std::error::Error;

use genie_client::{Client, Dtype, Memory};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or("usage: put_get SOCKET [NODE]")?;
    run(&socket, args.next().as_deref())
}

/// What the example does; the tests call it too.
pub fn run(socket: &str, node: Option<&str>) -> Result<(), Box<dyn Error>> {
    let mut client = Client::connect(socket)?;
    let arena = client.arena(1 << 20, Memory::Auto)?;
    // Allocated without asking anybody; written where the agent sends it from.
    let weights = arena.tensor("weights", Dtype::F32, &[2, 3])?;
    let values: Vec<u8> = (0..6u8).flat_map(|n| f32::from(n).to_le_bytes()).collect();
    weights.write(0, &values);

    let put = client.put(node, "example/put_get", &[weights], None)?;
    println!("put {} bytes over {}, {}", put.bytes, put.path, put.digest);

    let got = client.get(node, "example/put_get", Memory::Auto)?;
    let back = got.to_vec("weights").ok_or("the tensor is not there")?;
    if back != values {
        return Err("something else came back".into());
    }
    client.remove(node, "example/put_get")?;
    Ok(())
}
