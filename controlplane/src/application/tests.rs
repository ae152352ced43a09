use super::*;

/// One that is stopped takes nothing; what it asked for goes on meanwhile.
#[tokio::test]
async fn no_operation_waits_for_an_application_that_does_not_read() {
    let node = crate::session::testing::node();
    let user = node.quotas.user(0);
    let (stream, _reads_nothing) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&stream, 1).unwrap();
    let mut application = Application::new(node, stream, user);
    let progress = Progress::default();
    progress.begin(1 << 20);
    let moving = progress.clone();
    let operation = async move {
        // Long enough for more of it to be told than the buffer has room for.
        for _ in 0..30 {
            tokio::time::sleep(PROGRESS_EVERY).await;
            moving.add(1);
        }
        Ok::<_, TransferError>(())
    };
    let attended = timeout(PATIENCE, application.attend(operation, &progress)).await;
    attended
        .expect("it ends when the operation does")
        .expect("the connection is still good")
        .expect("the operation was done");
    let is_told = application.tell((0, 1)).await.unwrap();
    assert!(!is_told, "the buffer was full");
}
