//! Keeps a matrix on a node and fetches one column of it, awaiting every step.
//!
//! usage: partial_fetch SOCKET [NODE]

use std::error::Error;

use genie_client::{AsyncClient, Dtype, Memory, Span};

const ROWS: u64 = 1000;
const COLUMNS: u64 = 64;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or("usage: partial_fetch SOCKET [NODE]")?;
    run(&socket, args.next().as_deref()).await
}

/// What the example does; the tests call it too.
pub async fn run(socket: &str, node: Option<&str>) -> Result<(), Box<dyn Error>> {
    let client = AsyncClient::connect(socket).await?;
    let arena = client.arena(1 << 20, Memory::Auto).await?;
    let matrix = arena.tensor("matrix", Dtype::U16, &[ROWS, COLUMNS])?;
    let elements: Vec<u8> = (0..ROWS * COLUMNS)
        .flat_map(|n| (n as u16).to_le_bytes())
        .collect();
    matrix.write(0, &elements);
    let prefix = "example/partial_fetch";
    client.put(node, prefix, vec![matrix], None).await?;

    // A handle: nothing has moved yet.
    let remote = client.open(node, "example/partial_fetch/matrix").await?;
    let column = remote.slice(&[Span::stepped(0..ROWS, 10), (7..8).into()])?;
    let part = client.fetch(&remote, column, Memory::Auto).await?;
    println!(
        "fetched {:?}, {} of {} bytes",
        part.shape,
        part.moved.bytes,
        remote.len_bytes()
    );

    let expected: Vec<u8> = (0..ROWS)
        .step_by(10)
        .flat_map(|row| ((row * COLUMNS + 7) as u16).to_le_bytes())
        .collect();
    if part.to_vec() != expected {
        return Err("something else came".into());
    }
    client.remove(node, prefix).await?;
    Ok(())
}
